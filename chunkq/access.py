"""How storage behind a URL is accessed: with which credentials, endpoint and region."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any
from urllib.parse import urlsplit

from chunkq.web_requests import counting_client

S3_SCHEMES = frozenset({"s3", "s3a"})
GCS_SCHEMES = frozenset({"gs", "gcs"})
WEB_SCHEMES = frozenset({"http", "https"})
"""Schemes of web servers."""
BUCKET_SCHEMES = S3_SCHEMES | GCS_SCHEMES
"""Schemes for which an input can be `anonymous` or `requester_pays`."""
MISSING_OR_DENIED = frozenset({"AccessDenied", "403"})
"""Error codes of S3 for objects that do not exist, in a bucket that may not be listed. Other
errors with the status 403, such as InvalidAccessKeyId, concern the credentials."""
TENSORSTORE_CREDENTIALS = {
    "env": "environment",
    "shared-credentials-file": "profile",
    "config-file": "profile",
    "iam-role": "imds",
    "container-role": "ecs",
}
"""Where botocore has found credentials -> the provider of tensorstore that reads the same."""


@dataclass(frozen=True)
class Access:
    """What a job says about the access to an input.

    anonymous        send no credentials
    requester_pays   accept that the owner of the credentials pays for the requests
    """

    anonymous: bool = False
    requester_pays: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Access:
        """Return the access that the options of a format contain."""
        return cls(bool(options.get("anonymous")), bool(options.get("requester_pays")))

    @property
    def options(self) -> dict[str, bool]:
        """The options of a format for this access; those that are false are left out."""
        return {key: True for key, is_set in vars(self).items() if is_set}

    def storage_options(self, scheme: str) -> dict[str, Any]:
        """Return the options of the fsspec file system for a scheme."""
        # A cached listing would not show what other machines have written since.
        options: dict[str, Any] = {"use_listings_cache": False}
        if scheme in S3_SCHEMES:
            options |= {"anon": self.anonymous or not _has_credentials(_aws_environment())}
            if region := os.environ.get("AWS_REGION"):  # botocore reads AWS_DEFAULT_REGION only
                options |= {"client_kwargs": {"region_name": region}}
        elif scheme in WEB_SCHEMES:
            options |= {"get_client": counting_client}
        elif self.anonymous and scheme in GCS_SCHEMES:
            options |= {"token": "anon"}
        if self.requester_pays:
            options |= {"requester_pays": True}
        return options


DEFAULT_ACCESS = Access()
"""With the credentials that are found; without any, anonymously."""


def s3_filesystem(access: Access = DEFAULT_ACCESS, *, asynchronous: bool = False) -> Any:
    """Return the file system of S3, `asynchronous` for callers in an event loop of their own.

    Endpoint, region and credentials are those of the environment and of the AWS configuration, as
    for every tool on botocore. Without credentials, requests are anonymous. Raises ImportError if
    s3fs is missing, and botocore's errors if the configuration is invalid.
    """
    return _s3_filesystem(access, asynchronous, _aws_environment())


def tensorstore_s3(bucket: str, access: Access = DEFAULT_ACCESS) -> dict[str, Any] | None:
    """Return the members of tensorstore's kvstore `s3` that access the same as `s3_filesystem`.

    None if tensorstore does not support the configuration. Raises the errors of `s3_filesystem`.
    """
    filesystem = s3_filesystem(access)
    filesystem.connect()
    meta, session = filesystem.s3.meta, filesystem.session
    credentials = {"type": "anonymous"} if filesystem.anon else _tensorstore_credentials(session)
    # tensorstore's option `requester_pays` sends another header than S3 expects.
    if credentials is None or access.requester_pays or session.get_config_variable("ca_bundle"):
        return None
    spec: dict[str, Any] = {"aws_credentials": credentials}
    host = urlsplit(meta.endpoint_url).hostname or ""
    if host.endswith((".amazonaws.com", ".amazonaws.com.cn")):
        return spec  # tensorstore finds the region of the bucket
    if (meta.config.s3 or {}).get("addressing_style") == "virtual":
        return None
    region = _bucket_region(bucket, access, _aws_environment()) or meta.region_name
    spec |= {"endpoint": meta.endpoint_url, "aws_region": region}
    return spec | ({} if region and region != "aws-global" else {"aws_region": "us-east-1"})


@lru_cache(maxsize=64)
def _bucket_region(
    bucket: str, access: Access, environment: tuple[tuple[str, str], ...]
) -> str | None:
    """Return the region that the server names for a bucket, or None."""
    try:
        response = s3_filesystem(access).call_s3("head_bucket", Bucket=bucket)
    except OSError as error:
        response = getattr(error.__cause__, "response", None) or {}
    headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region: str | None = headers.get("x-amz-bucket-region")
    return region


def _tensorstore_credentials(session: Any) -> dict[str, str] | None:
    """Return tensorstore's provider of the credentials that a session of botocore uses."""
    kind = TENSORSTORE_CREDENTIALS.get(_credential_method(_aws_environment()) or "")
    if kind is None:
        return None
    if kind != "profile":
        return {"type": kind}
    # The AWS library logs an error for each file that does not exist.
    files = {
        key: path if os.path.exists(path) else os.devnull
        for key in ("config_file", "credentials_file")
        if (path := os.path.expanduser(session.get_config_variable(key)))
    }
    return {"type": kind, "profile": session.profile or "default", **files}


def is_forbidden(error: BaseException) -> bool:
    """Return whether a server refuses a request in the way that some answer for missing objects."""
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code")) in MISSING_OR_DENIED
    return isinstance(error, PermissionError) or getattr(error, "status", None) == 403


def sends_parts(filesystem: Any, inner: str) -> bool:
    """Return whether a web server sends parts of a file. Raises OSError."""
    try:
        with filesystem.open(inner, "rb", cache_type="none") as file:
            file.seek(1)
            file.read(1)
    except ValueError:
        return False
    return True


def is_denied(error: BaseException) -> bool:
    """Return whether a server refuses a request, also because of the credentials."""
    return isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403)


@cache  # like fsspec's: an asynchronous client that is dropped leaves its connections open
def _s3_filesystem(
    access: Access, asynchronous: bool, environment: tuple[tuple[str, str], ...]
) -> Any:
    import fsspec

    # fsspec caches instances too, but not by the environment.
    options = access.storage_options("s3") | {"skip_instance_cache": True}
    return fsspec.filesystem("s3", asynchronous=asynchronous, **options)


def _has_credentials(environment: tuple[tuple[str, str], ...]) -> bool:
    return _credential_method(environment) is not None


@lru_cache(maxsize=16)
def _credential_method(environment: tuple[tuple[str, str], ...]) -> str | None:
    """Return where botocore finds credentials, or None if there are none.

    `environment` is only a key of the cache. The instance metadata service is asked last, for about
    a second.
    """
    from botocore.session import Session

    credentials = Session().get_credentials()
    return None if credentials is None else str(credentials.method)


def _aws_environment() -> tuple[tuple[str, str], ...]:
    """Return the variables that choose endpoint, region and credentials."""
    names = (name for name in os.environ if name.startswith("AWS_") or name == "HOME")
    return tuple((name, os.environ[name]) for name in sorted(names))
