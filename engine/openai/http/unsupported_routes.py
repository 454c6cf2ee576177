"""Routes that vLLM has and this server does not: their 404 says so, and what to use instead."""

_POOLING = "it runs models that generate text, none that embed, rank or classify"
_MEDIA = "it serves text only"
_LORA = "adapters cannot be changed while it runs"
_DEVELOPER = "it has no developer routes"

NOT_OFFERED: dict[str, str] = {
    **dict.fromkeys(
        (
            *("/v1/embeddings", "/v2/embed", "/pooling", "/classify", "/score", "/v1/score", "/generative_scoring"),
            *("/rerank", "/v1/rerank", "/v2/rerank"),
        ),
        _POOLING,
    ),
    **dict.fromkeys(("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/realtime"), _MEDIA),
    **dict.fromkeys(("/v1/load_lora_adapter", "/v1/unload_lora_adapter"), _LORA),
    "/inference/v1/generate": "send token ids as the `prompt` of /v1/completions, with `return_token_ids`",
    "/abort_requests": "close the connection of a request to end it",
    "/invocations": "use /v1/chat/completions or /v1/completions",
    "/tokenizer_info": "use /tokenize and /detokenize",
    **dict.fromkeys(
        (
            *("/server_info", "/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache", "/collective_rpc"),
            *("/sleep", "/wake_up", "/is_sleeping", "/pause", "/resume", "/is_paused"),
            *("/start_profile", "/stop_profile"),
        ),
        _DEVELOPER,
    ),
}
"""Why each is not offered."""


def not_found(path: str, detail: str) -> str:
    """The message of a 404 for ``path``; ``detail`` is what the router says."""
    if path in NOT_OFFERED:
        return f"This server does not offer {path}: {NOT_OFFERED[path]}."
    return f"This server knows no route {path}." if detail == "Not Found" else detail
