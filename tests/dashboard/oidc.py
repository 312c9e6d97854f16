"""An OpenID Connect provider that logs everyone in as one account, at once: the four endpoints that a client asks."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from joserfc import jwt
from joserfc.jwk import RSAKey

CLIENT = "rlvr"


@contextmanager
def provider(account: dict[str, Any]) -> Iterator[str]:
    """Its address, while it runs. account: the claims about whoever logs in; change it to log in another."""
    key = RSAKey.generate_key(2048, {"kid": "one", "use": "sig", "alg": "RS256"})
    nonces: dict[str, str] = {}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def say(self, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            asked = urlsplit(self.path)
            if asked.path == "/.well-known/openid-configuration":
                self.say({
                    "issuer": url, "authorization_endpoint": f"{url}/authorize", "token_endpoint": f"{url}/token",
                    "jwks_uri": f"{url}/keys", "response_types_supported": ["code"],
                    "subject_types_supported": ["public"], "id_token_signing_alg_values_supported": ["RS256"],
                })  # fmt: skip
            elif asked.path == "/keys":
                self.say({"keys": [key.as_dict(private=False)]})
            else:  # /authorize
                query = {name: values[0] for name, values in parse_qs(asked.query).items()}
                code = str(len(nonces))
                nonces[code] = query.get("nonce", "")
                self.send_response(302)
                self.send_header(
                    "Location", f"{query['redirect_uri']}?{urlencode({'code': code, 'state': query['state']})}"
                )
                self.send_header("Content-Length", "0")
                self.end_headers()

        def do_POST(self) -> None:  # /token
            body = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            now = int(time.time())
            claims = {"iss": url, "aud": CLIENT, "sub": "1", "iat": now, "exp": now + 600, **account}
            claims["nonce"] = nonces[body["code"][0]]
            token = jwt.encode({"alg": "RS256", "kid": "one"}, claims, key)
            self.say({"access_token": "a", "token_type": "Bearer", "expires_in": 600, "id_token": token})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield url
    finally:
        server.shutdown()
        server.server_close()
