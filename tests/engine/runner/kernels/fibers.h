// A block of a GPU on this machine: its threads are fibers, each of which runs until it has to wait for others.
// Every other block runs its threads in reverse, so that a barrier that is missing is missed by one of the two.
#pragma once
#include <setjmp.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

static const unsigned MOST_THREADS = 1024;
static const size_t STACK = 1 << 17;
// Not reserved: each kernel's library has its own, and a process that had reserved them all could not fork any more.
static char* const stacks = static_cast<char*>(
    mmap(nullptr, STACK * MOST_THREADS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
static jmp_buf scheduler, fibers[MOST_THREADS];
static unsigned current_thread, threads_in_block, blocks_run;
static bool started[MOST_THREADS], done[MOST_THREADS];
static long at_barrier[MOST_THREADS], at_exchange[MOST_THREADS];
static unsigned handed_in[2][MOST_THREADS];
static const char* fault = "";           // what a GPU would not forgive
static void (*body)();

static void rest() {                     // another thread's turn
  const unsigned me = current_thread;
  if (!_setjmp(fibers[me])) _longjmp(scheduler, 1);
  current_thread = me;
}
static void meet(long* count, unsigned first, unsigned number) {
  const long mine = ++count[current_thread];
  for (unsigned i = first; i < first + number; ++i) {
    while (!done[i] && count[i] < mine) rest();
    if (count[i] < mine) fault = "threads that have ended are waited for";
  }
}
static void barrier() { meet(at_barrier, 0, threads_in_block); }
// The value of lane `from` of the caller's 32, each of which hands one in.
static unsigned exchange(unsigned value, unsigned from) {
  const unsigned side = at_exchange[current_thread] & 1, first = current_thread & ~31u;
  handed_in[side][current_thread] = value;
  meet(at_exchange, first, 32);
  return handed_in[side][first + (from & 31)];
}
static bool any_of_warp(bool one) {
  unsigned any = one;
  for (unsigned mask = 16; mask > 0; mask >>= 1) any |= exchange(any, (current_thread & 31) ^ mask);
  return any;
}

static bool any_of_block(bool one) {
  static bool votes[2][MOST_THREADS];
  const unsigned side = at_barrier[current_thread] & 1;
  votes[side][current_thread] = one;
  barrier();
  bool any = false;
  for (unsigned i = 0; i < threads_in_block; ++i) any |= votes[side][i];
  return any;
}

static void enter() {
  body();
  done[current_thread] = 1;
  _longjmp(scheduler, 1);
}
static void resume(unsigned thread) {
  current_thread = thread;
  if (_setjmp(scheduler)) return;
  if (started[thread]) _longjmp(fibers[thread], 1);
  started[thread] = 1;
  ucontext_t fresh;
  getcontext(&fresh);
  fresh.uc_stack.ss_sp = stacks + STACK * thread;
  fresh.uc_stack.ss_size = STACK;
  fresh.uc_link = nullptr;
  makecontext(&fresh, enter, 0);
  setcontext(&fresh);
}
static void run_block(unsigned threads, void (*kernel)()) {
  body = kernel;
  threads_in_block = threads;
  memset(started, 0, sizeof started); memset(done, 0, sizeof done);
  memset(at_barrier, 0, sizeof at_barrier); memset(at_exchange, 0, sizeof at_exchange);
  if (threads % 32 || threads > MOST_THREADS) fault = "a block is not of whole warps, or too large";
  const bool backwards = ++blocks_run % 2;
  for (bool any = true; any;) {
    any = false;
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned thread = backwards ? threads - 1 - i : i;
      if (!done[thread]) { any = true; resume(thread); }
    }
  }
}
