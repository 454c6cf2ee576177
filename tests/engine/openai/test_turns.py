"""The notebook's own requests beside those of the port's clients, on the real engine with a scripted model."""

from collections.abc import Callable

from engine import LLM, SamplingParams
from tests.engine.openai.conftest import http_client
from tests.engine.test_live_settings import COUNTING, PROMPT, wait_until

NUM_CLIENTS = 60


def test_a_cell_is_answered_while_the_ports_clients_hold_every_seat_and_the_queue(
    scripted_llm: Callable[..., LLM],
) -> None:
    llm = scripted_llm(COUNTING, step_seconds=0.002, max_num_seqs=2)
    with http_client(llm.serve(api_key="k")) as http:
        body = {"input": PROMPT, "background": True, "max_output_tokens": 150, "temperature": 0}
        ids = [http.post("/v1/responses", json=body).json()["id"] for _ in range(NUM_CLIENTS)]
        wait_until(lambda: llm.activity().num_running == 2)
        for number in range(3):
            before = llm.activity().num_waiting
            output = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)[0]
            assert len(output.outputs[0].token_ids) == 4
            activity = llm.activity()
            assert activity.num_waiting >= before - 4, f"cell {number} waited for none to end, or a few"
            places = sorted(request.place for request in activity.requests if request.place is not None)
            assert places == list(range(1, activity.num_waiting + 1))
        assert sum(request.params.max_tokens == 150 for request in llm.activity().requests) > NUM_CLIENTS - 8
        for response_id in ids:
            http.post(f"/v1/responses/{response_id}/cancel")
    wait_until(lambda: not llm.activity().requests)


def test_a_client_is_answered_while_the_notebooks_prompts_hold_every_seat_and_the_queue(
    scripted_llm: Callable[..., LLM],
) -> None:
    llm = scripted_llm(COUNTING, step_seconds=0.002, max_num_seqs=2)
    own = [llm.submit_prompt(PROMPT, SamplingParams(temperature=0, max_tokens=30)) for _ in range(NUM_CLIENTS)]
    with http_client(llm.serve(api_key="k")) as http:
        body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0}
        assert http.post("/v1/completions", json=body).status_code == 200
        assert sum(stream.finished for stream in own) < 10
    for stream in own:
        stream.abort()
    wait_until(lambda: not llm.activity().requests)
