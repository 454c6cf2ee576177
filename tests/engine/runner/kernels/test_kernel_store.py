"""Compiled kernels on disk: private, whole or not there, and not without bounds."""

import os
import threading
from pathlib import Path

import pytest

from engine.runner.kernels import kernel_store
from engine.runner.kernels.kernel_store import KernelStore, make_private, replace_file

BODY = bytes(range(256)) * 20


@pytest.fixture
def store(tmp_path: Path) -> KernelStore:
    return KernelStore(tmp_path / "vm-magic" / "kernels")


def file_of(store: KernelStore, key: str = "key") -> Path:
    return store.folder / f"{key}.kernel"


def test_what_was_put_is_found_by_another_process(store: KernelStore) -> None:
    assert store.get("key") is None
    assert store.put("key", BODY)
    assert KernelStore(store.folder).get("key") == BODY


def test_folder_and_files_are_this_users_alone_whatever_the_umask(store: KernelStore) -> None:
    before = os.umask(0)
    try:
        store.put("key", BODY)
    finally:
        os.umask(before)
    assert store.folder.stat().st_mode & 0o777 == 0o700
    assert file_of(store).stat().st_mode & 0o777 == 0o600


def test_a_folder_that_others_may_enter_is_closed_to_them(store: KernelStore) -> None:
    store.folder.mkdir(parents=True)
    store.folder.chmod(0o777)
    store.put("key", BODY)
    assert store.folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[:-1],
        lambda content: content[:10],
        lambda content: b"",
        lambda content: content + b"x",
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: bytes([content[0] ^ 1]) + content[1:],
        lambda content: content[:30] + bytes([content[30] ^ 1]) + content[31:],
    ],
    ids=["cut by a byte", "cut to a header's part", "empty", "longer", "altered body", "altered magic", "altered sum"],
)
def test_a_torn_or_altered_file_is_a_miss_and_is_replaced(store: KernelStore, spoil) -> None:
    store.put("key", BODY)
    file_of(store).write_bytes(spoil(file_of(store).read_bytes()))
    assert store.get("key") is None
    assert store.put("key", BODY)
    assert store.get("key") == BODY


def test_a_file_under_another_files_name_is_a_miss(store: KernelStore) -> None:
    store.put("key", BODY)
    file_of(store).rename(file_of(store, "other"))
    assert store.get("other") is None


def test_a_file_of_someone_else_is_a_miss(store: KernelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("key", BODY)
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    assert store.get("key") is None


@pytest.mark.parametrize("mode", [0o620, 0o602], ids=["group", "all"])
def test_a_file_that_others_may_write_is_a_miss(store: KernelStore, mode: int) -> None:
    store.put("key", BODY)
    file_of(store).chmod(mode)
    assert store.get("key") is None


def test_a_link_and_a_pipe_are_misses(store: KernelStore, tmp_path: Path) -> None:
    store.put("key", BODY)
    elsewhere = tmp_path / "elsewhere"
    file_of(store).rename(elsewhere)
    file_of(store).symlink_to(elsewhere)
    assert store.get("key") is None
    os.mkfifo(file_of(store, "pipe"), 0o600)
    assert store.get("pipe") is None


def test_nothing_is_kept_in_a_folder_of_someone_else(store: KernelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.folder.mkdir(parents=True, mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    assert not store.put("key", BODY)
    assert not list(store.folder.iterdir())


def test_a_folder_that_is_a_link_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert not make_private(tmp_path / "link")


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = KernelStore(tmp_path / "file" / "kernels")
    assert not store.put("key", BODY)
    assert store.get("key") is None


def test_a_file_appears_whole_or_not_at_all(store: KernelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("key", b"before")

    def broken(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", broken)
    assert not store.put("key", BODY)
    assert store.get("key") == b"before"
    assert [path.name for path in store.folder.iterdir()] == ["key.kernel"]


def test_what_was_used_longest_ago_goes_when_there_is_too_much(tmp_path: Path) -> None:
    store = KernelStore(tmp_path / "kernels", most_bytes=3 * (len(BODY) + 100))
    for number, key in enumerate(("a", "b", "c")):
        store.put(key, BODY)
        os.utime(file_of(store, key), (number, number))
    assert store.get("a") == BODY  # used now
    store.put("d", BODY)
    assert {path.stem for path in store.folder.iterdir()} == {"a", "c", "d"}


def test_what_a_killed_process_left_is_removed_after_an_hour(store: KernelStore) -> None:
    store.put("key", BODY)
    old, new = store.folder / ".writing-old", store.folder / ".writing-new"
    for path in (old, new):
        path.write_bytes(BODY)
    os.utime(old, (0, 0))
    store.put("other", BODY)
    assert not old.exists()
    assert new.exists()


def test_many_writers_of_one_key_leave_one_whole_file(store: KernelStore) -> None:
    bodies = [bytes([number]) * 5000 for number in range(8)]
    seen: list[bytes | None] = []

    def work(body: bytes) -> None:
        for _ in range(20):
            store.put("key", body)
            seen.append(store.get("key"))

    threads = [threading.Thread(target=work, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 160
    assert set(seen) <= set(bodies)
    assert [path.name for path in store.folder.iterdir()] == ["key.kernel"]


def test_a_file_is_written_with_its_final_rights_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []
    replace = os.replace
    monkeypatch.setattr(
        kernel_store.os, "replace", lambda a, b: (modes.append(os.stat(a).st_mode & 0o777), replace(a, b))
    )
    assert replace_file(tmp_path / "x", BODY)
    assert modes == [0o600]
