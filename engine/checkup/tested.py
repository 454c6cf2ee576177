"""The newest versions that the tests passed with: those of ``.ci/newest.txt``, for who has no clone."""

TESTED: dict[str, str] = {
    "docstring-parser": "0.18.0",
    "fastapi": "0.165.0",
    "gguf": "0.19.0",
    "h11": "0.16.0",
    "httpx": "0.28.1",
    "huggingface-hub": "2.4.0",
    "ipython": "9.18.1",
    "ipywidgets": "8.1.9",
    "jinja2": "3.1.6",
    "llguidance": "1.9.1",
    "mlx": "0.32.4",
    "mlx-lm": "0.32.2",
    "numpy": "2.4.6",
    "prometheus-client": "0.26.0",
    "pydantic": "2.14.4",
    "pyyaml": "6.0.4",
    "tokenizers": "0.23.3",
    "tqdm": "4.70.1",
    "uvicorn": "0.54.0",
}
