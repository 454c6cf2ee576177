"""Key, Host, Origin, CORS and body size."""

import httpx
import openai
import pytest

from engine.errors import ConfigError
from engine.openai.server import ServerHandle, start_server
from tests.engine.openai import strict
from tests.engine.openai.conftest import KEY, Serve, http_client
from tests.engine.openai.fakes import FakeLLM

GET_PATHS = ("/v1/models", "/metrics", "/version", "/load", "/ping", "/docs", "/openapi.json")
POST_PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/ping")


def bare(server: ServerHandle) -> httpx.Client:
    client = http_client(server)
    del client.headers["Authorization"]
    return client


def test_every_route_but_health_asks_for_the_key(server: ServerHandle) -> None:
    with bare(server) as http:
        for path in GET_PATHS:
            strict.error(http.get(path), 401, "Unauthorized")
        for path in POST_PATHS:
            strict.error(http.post(path, json={}), 401, "Unauthorized")
        assert http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"Authorization": "Bearer"},
        {"Authorization": f"Bearer {KEY}x"},
        {"x-api-key": "wrong"},
        {"Authorization": "Bearer schlüssel".encode().decode("latin-1")},
    ],
)
def test_a_wrong_key_is_unauthorized(server: ServerHandle, headers: dict[str, str]) -> None:
    with bare(server) as http:
        encoded = {name: value.encode("latin-1") for name, value in headers.items()}
        strict.error(http.get("/v1/models", headers=encoded), 401, "Unauthorized")


def test_both_headers_carry_the_key(server: ServerHandle) -> None:
    with bare(server) as http:
        assert http.get("/v1/models", headers={"Authorization": f"bearer {KEY}"}).status_code == 200
        assert http.get("/v1/models", headers={"x-api-key": KEY}).status_code == 200


def test_the_openai_client_raises_its_authentication_error(server: ServerHandle) -> None:
    options = {"base_url": server.base_url, "http_client": httpx.Client(trust_env=False)}
    with openai.OpenAI(api_key="wrong", **options) as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_several_keys_are_all_good(serve: Serve) -> None:
    with bare(serve(api_key=["one", "two"])) as http:
        for key in ("one", "two"):
            assert http.get("/v1/models", headers={"x-api-key": key}).status_code == 200


def test_without_a_key_given_one_is_made_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    first, second = serve(api_key=None), serve(api_key=None)
    assert first.api_key
    assert second.api_key
    assert first.api_key.startswith("sk-")
    assert first.api_key != second.api_key
    assert first.api_key not in repr(first)
    monkeypatch.setenv("VLLM_API_KEY", "from-env")
    assert serve(api_key=None).api_key == "from-env"


def test_no_api_key_opens_the_port_on_loopback_only(serve: Serve, llm: FakeLLM) -> None:
    server = serve(api_key=None, no_api_key=True)
    assert server.api_key is None
    with http_client(server) as http:
        assert http.get("/v1/models").status_code == 200
    with pytest.raises(ConfigError, match=r"--no-api-key with --host 0\.0\.0\.0"):
        start_server(llm, host="0.0.0.0", no_api_key=True)
    with pytest.raises(ConfigError, match="exclude each other"):
        start_server(llm, api_key="x", no_api_key=True)
    with pytest.raises(ConfigError, match="not empty"):
        start_server(llm, api_key="")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example", "10.0.0.1", ""])
def test_a_foreign_host_name_is_refused(server: ServerHandle, host: str) -> None:
    with http_client(server) as http:
        strict.error(http.get("/health", headers={"Host": host}), 400, "BadRequestError")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:99", "[::1]:8000", "localhost."])
def test_names_of_this_machine_are_served(server: ServerHandle, host: str) -> None:
    with http_client(server) as http:
        assert http.get("/health", headers={"Host": host}).status_code == 200


def test_allowed_hosts_adds_names_and_patterns(serve: Serve) -> None:
    with http_client(serve(allowed_hosts=["box.local", "*.lab.example"])) as http:
        for host, status in (("box.local:80", 200), ("a.lab.example", 200), ("lab.example", 400), ("xbox.local", 400)):
            assert http.get("/health", headers={"Host": host}).status_code == status, host


def test_on_all_interfaces_addresses_are_served_but_names_are_not(serve: Serve) -> None:
    server = serve(host="0.0.0.0")
    assert server.base_url.startswith("http://127.0.0.1:")
    with http_client(server) as http:
        assert http.get("/health", headers={"Host": "192.168.1.7:8000"}).status_code == 200
        assert http.get("/health", headers={"Host": "evil.example"}).status_code == 400


def test_foreign_web_pages_are_refused_even_with_the_key(server: ServerHandle) -> None:
    with http_client(server) as http:
        for origin in ("http://evil.example", "null", "http://localhost:8888"):
            strict.error(http.get("/v1/models", headers={"Origin": origin}), 403, "Forbidden")
        own = str(http.base_url).rstrip("/")
        assert http.get("/v1/models", headers={"Origin": own}).status_code == 200


def test_allowed_origins_get_preflights_and_cors_headers(serve: Serve) -> None:
    origin = "http://page.example"
    preflight = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    with bare(serve(allowed_origins=[origin])) as http:
        answer = http.options("/v1/chat/completions", headers=preflight)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert "authorization" in answer.headers["access-control-allow-headers"]
        foreign = http.options("/v1/chat/completions", headers={**preflight, "Origin": "http://evil.example"})
        strict.error(foreign, 403, "Forbidden")
        reply = http.get("/v1/models", headers={"Origin": origin, "x-api-key": KEY})
        assert reply.headers["access-control-allow-origin"] == origin
        unauthorized = http.get("/v1/models", headers={"Origin": origin})
        assert unauthorized.headers["access-control-allow-origin"] == origin
        strict.error(unauthorized, 401, "Unauthorized")


def test_a_star_allows_every_page(serve: Serve) -> None:
    with http_client(serve(allowed_origins=["*"])) as http:
        assert http.get("/v1/models", headers={"Origin": "http://any.example"}).status_code == 200


def test_bodies_are_bounded_announced_or_not(serve: Serve) -> None:
    with http_client(serve(max_body_bytes=1000)) as http:
        big = b'{"prompt": "' + b"x" * 2000 + b'"}'
        headers = {"content-type": "application/json"}
        strict.error(http.post("/tokenize", content=big, headers=headers), 413, "Request Entity Too Large")
        chunks = iter([big[:800], big[800:]])
        strict.error(http.post("/tokenize", content=chunks, headers=headers), 413, "Request Entity Too Large")
        assert http.post("/tokenize", json={"prompt": "x"}).status_code == 200


def test_a_proxys_root_path_does_not_open_other_paths(serve: Serve) -> None:
    with bare(serve(root_path="/proxy")) as http:
        assert http.get("/proxy/health").status_code == 200
        assert http.get("/health").status_code == 200
        for path in ("/proxy/metrics", "/metrics", "/health/../metrics", "/v1/health"):
            assert http.get(path).status_code == 401, path
        authorized = {"x-api-key": KEY}
        assert http.get("/proxy/v1/models", headers=authorized).status_code == 200
        assert http.get("/v1/models", headers=authorized).status_code == 200


PROXIED = {"X-Forwarded-Context": "/user/me/proxy/{port}", "X-Proxycontextpath": "/user/me/proxy/{port}"}
"""What jupyter-server-proxy 4.6 adds; it passes Host, Origin, Authorization and x-api-key on as they come."""


def through_the_hub(server: ServerHandle, host: str, **headers: str) -> dict[str, str]:
    return {
        "Host": host,
        "Authorization": "token the-hubs-own",
        "x-api-key": server.api_key or "",
        **{name: value.format(port=server.port) for name, value in PROXIED.items()},
        **headers,
    }


@pytest.mark.parametrize(
    ("environment", "served", "address"),
    [
        ({"JUPYTERHUB_PUBLIC_URL": "https://hub.example.org:444/user/me/"}, "hub.example.org:444", "https://{}"),
        ({"JUPYTERHUB_HOST": "https://hub.example.org", "JUPYTERHUB_USER": "me"}, "me.hub.example.org", "https://{}"),
        ({}, "hub.example.org", ""),
    ],
)
def test_the_hubs_name_is_served_as_advertised_and_no_other(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], served: str, address: str
) -> None:
    for name, value in {"JUPYTERHUB_SERVICE_PREFIX": "/user/me/", **environment}.items():
        monkeypatch.setenv(name, value)
    server = serve()
    assert server.hub_url == f"{address.format(served)}/user/me/proxy/{server.port}/v1"
    assert f"through the hub {server.hub_url}" in repr(server)
    with bare(server) as http:
        good = through_the_hub(server, served)
        assert http.get("/v1/models", headers=good).status_code == 200
        page = {**good, "Origin": f"https://{served}"}
        assert http.get("/v1/models", headers=page).status_code == 200
        strict.error(http.get("/v1/models", headers={**good, "Origin": "https://evil.example"}), 403, "Forbidden")
        strict.error(http.get("/v1/models", headers={**good, "x-api-key": "wrong"}), 401, "Unauthorized")
        foreign = {"Host": "evil.example", "x-api-key": KEY}
        strict.error(http.get("/v1/models", headers=foreign), 400, "BadRequestError")
        if not address:
            other = through_the_hub(server, served, **{"X-Forwarded-Context": f"/user/you/proxy/{server.port}"})
            strict.error(http.get("/v1/models", headers=other), 400, "BadRequestError")
        else:
            strict.error(http.get("/v1/models", headers={**good, "Host": "evil.example"}), 400, "BadRequestError")


def test_without_a_key_a_hub_of_unknown_name_is_not_served(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/me/")
    server = serve(api_key=None, no_api_key=True)
    with http_client(server) as http:
        refused = http.get("/v1/models", headers=through_the_hub(server, "hub.example.org"))
        assert "--allowed-hosts" in strict.error(refused, 400, "BadRequestError")
    named = serve(api_key=None, no_api_key=True, allowed_hosts=["hub.example.org"])
    with http_client(named) as http:
        assert http.get("/v1/models", headers=through_the_hub(named, "hub.example.org")).status_code == 200


def test_outside_of_a_hub_a_proxys_headers_open_nothing(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUPYTERHUB_SERVICE_PREFIX", raising=False)
    server = serve()
    assert server.hub_url is None
    with bare(server) as http:
        strict.error(http.get("/v1/models", headers=through_the_hub(server, "hub.example.org")), 400, "BadRequestError")
