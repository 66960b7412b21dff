"""A strict S3 server for tests: it checks signatures, regions and payers of reading requests."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from tests.harness.servers.web import serving

KEY, SECRET = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI-K7MDENG-bPxRfiCYEXAMPLEKEY"
AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=([^/]+)/\d+/([^/]+)/s3/aws4_request, "
    r"SignedHeaders=([^,]+), Signature=([0-9a-f]{64})"
)


@dataclass
class Bucket:
    """A bucket with the files of a folder, for reading.

    is_public       requests without a signature are answered
    can_list        whether it can be listed; if not, missing objects are answered with 403
    payer           whether requests must accept to pay
    region          region of the bucket; other signatures are answered with 301
    expired         whether the credentials have expired
    sent            keys of the objects that were sent, in order
    """

    folder: Path
    name: str = "lab"
    is_public: bool = False
    can_list: bool = False
    payer: bool = False
    region: str = "us-east-1"
    expired: bool = False
    refused: str | None = None
    signed: list[bool] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)

    def problem(self, method: str, path: str, query: str, headers: dict[str, str]) -> str | None:
        """Return the code of the error for a request, or None."""
        authorization = AUTHORIZATION.fullmatch(headers.get("authorization", ""))
        self.signed.append(authorization is not None)
        if authorization is None:
            return None if self.is_public and not self.payer else "AccessDenied"
        key, region, names, signature = authorization.groups()
        is_paid = headers.get("x-amz-request-payer") == "requester"
        problems = {
            "InvalidAccessKeyId": key != KEY,
            "ExpiredToken": self.expired,
            "PermanentRedirect": region != self.region,
            "AccessDenied": self.payer and not is_paid,
        }
        url = f"http://{headers['host']}{path}" + (f"?{query}" if query else "")
        request = AWSRequest(method, url)
        for name in names.split(";"):
            request.headers[name] = headers[name]
        request.context["timestamp"] = headers["x-amz-date"]
        auth = S3SigV4Auth(Credentials(KEY, SECRET), "s3", region)
        canonical = auth.canonical_request(request)
        expected = auth.signature(auth.string_to_sign(request, canonical), request)
        problems["SignatureDoesNotMatch"] = signature != expected
        return next((code for code, is_wrong in problems.items() if is_wrong), None)


STATUS = {
    "AccessDenied": 403,
    "ExpiredToken": 400,
    "InvalidAccessKeyId": 403,
    "NoSuchKey": 404,
    "PermanentRedirect": 301,
    "SignatureDoesNotMatch": 403,
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        bucket, parts = self.bucket, urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        problem = bucket.problem(self.command, parts.path, parts.query, headers)
        name, _, key = unquote(parts.path).removeprefix("/").partition("/")
        if problem is not None or name != bucket.name:
            self._fail(problem or "AccessDenied")
        elif not key:
            self._list(parse_qs(parts.query, keep_blank_values=True))
        elif bucket.refused is not None and bucket.refused in key:
            self._fail("AccessDenied")
        elif not (bucket.folder / key).is_file():
            self._fail("NoSuchKey" if bucket.can_list else "AccessDenied")
        else:
            if self.command == "GET":
                bucket.sent.append(key)
            self._send_file((bucket.folder / key).read_bytes())

    def _send_file(self, content: bytes) -> None:
        requested = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if requested is None:
            self._send(200, content)
            return
        first, last = requested.groups()
        start = int(first) if first else max(len(content) - int(last), 0)
        stop = min(int(last) + 1 if first and last else len(content), len(content))
        place = f"bytes {start}-{stop - 1}/{len(content)}"
        self._send(206, content[start:stop], **{"Content-Range": place})

    def _list(self, query: dict[str, list[str]]) -> None:
        if self.command == "HEAD":
            self._send(200, b"")
            return
        if not self.bucket.can_list:
            self._fail("AccessDenied")
            return
        folder, prefix = self.bucket.folder, query.get("prefix", [""])[0]
        files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        names = [name for name in files if name.startswith(prefix)]
        items = "".join(
            f"<Contents><Key>{quote(n)}</Key><Size>1</Size>"
            "<LastModified>2020-01-01T00:00:00Z</LastModified></Contents>"
            for n in names[: int(query.get("max-keys", ["1000"])[0])]
        )
        text = f"<ListBucketResult><KeyCount>{len(names)}</KeyCount>{items}</ListBucketResult>"
        self._send(200, text.encode())

    def _fail(self, code: str) -> None:
        text = f"<Error><Code>{code}</Code><Message>The answer is {code}.</Message></Error>"
        self._send(STATUS[code], text.encode())

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("x-amz-bucket-region", self.bucket.region)
        self.send_header("ETag", '"0123456789abcdef0123456789abcdef"')
        self.send_header("Last-Modified", "Wed, 01 Jan 2020 00:00:00 GMT")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def strict_s3(bucket: Bucket) -> Iterator[str]:
    """Serve a bucket; yield the server's URL."""
    handler = type("BucketHandler", (Handler,), {"bucket": bucket})
    with serving(handler) as url:
        yield url
