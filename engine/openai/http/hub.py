"""JupyterHub around this kernel: under which address it reaches the port, through jupyter-server-proxy.

The proxy passes the ``Host`` on that the browser or client wrote, and says in a header of its own which of its paths
was asked for. Who calls through it sends the hub's token as ``Authorization``, which the proxy asks for, and the port's
key as ``x-api-key``.
"""

import os
import re
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit

_PLAIN_USER = re.compile(r"[a-z0-9][a-z0-9-]*")


@dataclass(frozen=True)
class Hub:
    """``prefix`` is the path of this user's server; ``origin`` its scheme and name, empty where that is not known."""

    prefix: str
    origin: str = ""

    @classmethod
    def of_environment(cls) -> Self | None:
        """What the hub told this process; None outside of a hub."""
        prefix = os.environ.get("JUPYTERHUB_SERVICE_PREFIX")
        if prefix is None:
            return None
        public = urlsplit(os.environ.get("JUPYTERHUB_PUBLIC_URL", ""))
        hub = urlsplit(os.environ.get("JUPYTERHUB_HOST", ""))  # set where each user has a subdomain of this name
        user = os.environ.get("JUPYTERHUB_USER", "")
        if public.netloc:
            origin = f"{public.scheme}://{public.netloc}"
        elif hub.netloc and _PLAIN_USER.fullmatch(user):
            origin = f"{hub.scheme}://{user}.{hub.netloc}"
        else:
            origin = ""
        return cls(f"/{prefix.strip('/')}", origin)

    @property
    def name(self) -> str | None:
        """The host's name without a port, None where it is not known."""
        return urlsplit(self.origin).hostname

    def path(self, port: int) -> str:
        """The path under which the proxy reaches ``port``."""
        return f"{self.prefix.rstrip('/')}/proxy/{port}"

    def base_url(self, port: int) -> str:
        """The port's address for clients; a path alone where the hub's name is not known."""
        return f"{self.origin}{self.path(port)}/v1"
