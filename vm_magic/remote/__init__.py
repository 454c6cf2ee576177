"""A model behind an OpenAI-compatible server, such as a vLLM cluster: ``%vllm_metal connect``.

:class:`vm_magic.remote.llm.RemoteLLM` stands where the loaded model would; importing this package imports no
HTTP library.
"""
