"""`mmjax serve`: its flags, and the server process."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import logging.config
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import uvicorn
from mmjax.serve import tracing
from mmjax.serve.app import create_app
from mmjax.serve.context import ServerSettings

from mmjax import LLM, AsyncLLM
from mmjax.parsers import REASONING_PARSERS, TOOL_PARSERS


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the server. The flags of the engine are added elsewhere."""
    group = parser.add_argument_group("server")
    yes = argparse.BooleanOptionalAction
    group.add_argument("--host", default="0.0.0.0", help="address to listen on")
    group.add_argument("--port", type=int, default=8000, help="port to listen on")
    group.add_argument("--uds", help="Unix socket to listen on instead")
    group.add_argument(
        "--served-model-name", nargs="+", metavar="NAME",
        help="names of the model; responses have the first (unset: the value of `model`)",
    )  # fmt: skip
    group.add_argument("--api-key", nargs="+", metavar="KEY", help="API keys; requests must send one of them")
    group.add_argument("--response-role", default="assistant", help="role of generated messages")
    group.add_argument(
        "--chat-template-content-format", choices=("auto", "string", "openai"), default="auto",
        help="how the chat template takes message contents: as a string, or as parts; `auto` detects it",
    )  # fmt: skip
    group.add_argument(
        "--default-chat-template-kwargs", type=_json, metavar="JSON", default={},
        help="variables of the chat template; those of a request override them",
    )  # fmt: skip
    group.add_argument(
        "--trust-request-chat-template", action=yes, default=False, help="accept chat templates in requests"
    )
    group.add_argument(
        "--tool-call-parser", choices=("auto", *TOOL_PARSERS, "none"), default="auto",
        help="format of tool calls in outputs; `auto` takes it from the chat template, `none` leaves them in the text",
    )  # fmt: skip
    group.add_argument(
        "--reasoning-parser", choices=("auto", *REASONING_PARSERS, "none"), default="auto",
        help="format of reasoning in outputs; `auto` takes it from the chat template, `none` leaves it in the text",
    )  # fmt: skip
    group.add_argument(
        "--enable-auto-tool-choice", action=yes, help="accepted; the tools of a request are always enabled"
    )
    group.add_argument(
        "--enable-prompt-tokens-details",
        action=yes,
        default=False,
        help="report in the usage how many tokens of the prompt were cached",
    )
    group.add_argument(
        "--enable-force-include-usage", action=yes, default=False, help="end every stream with its usage"
    )
    group.add_argument(
        "--enable-request-id-headers", action=yes, default=False,
        help="add X-Request-Id to responses: the client's, or a random one",
    )  # fmt: skip
    group.add_argument(
        "--otlp-traces-endpoint", metavar="URL",
        help="collector of OpenTelemetry that gets a trace of each request; a URL with a path is HTTP, else gRPC",
    )  # fmt: skip
    group.add_argument("--max-queue", type=int, default=1024, help="most requests in progress; further ones get 429")
    group.add_argument("--max-body-mb", type=float, default=256.0, help="largest request in MiB; larger ones get 413")
    group.add_argument(
        "--drain-timeout", type=int, default=30, help="seconds that a shutdown waits for running requests"
    )
    _add_http_flags(group)


def _add_http_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags for CORS, proxies, TLS and logging."""
    yes = argparse.BooleanOptionalAction
    group.add_argument(
        "--allowed-origins", type=_words, nargs="+", metavar="ORIGIN", default=[["*"]],
        help="sites whose pages may send requests (CORS)",
    )  # fmt: skip
    group.add_argument(
        "--allowed-methods", type=_words, nargs="+", metavar="METHOD", default=[["*"]],
        help="methods that such pages may use",
    )  # fmt: skip
    group.add_argument(
        "--allowed-headers", type=_words, nargs="+", metavar="HEADER", default=[["*"]],
        help="headers that such pages may send",
    )  # fmt: skip
    group.add_argument("--allow-credentials", action=yes, default=False, help="whether such pages may send cookies")
    group.add_argument("--root-path", default="", help="path prefix that a proxy strips")
    group.add_argument("--ssl-keyfile", metavar="FILE", help="private key, for https")
    group.add_argument("--ssl-certfile", metavar="FILE", help="certificate, for https")
    group.add_argument("--ssl-ca-certs", metavar="FILE", help="CA certificates for client certificates")
    group.add_argument(
        "--ssl-cert-reqs", type=int, default=0, help="client certificates: 0 none, 1 optional, 2 required"
    )
    group.add_argument("--ssl-ciphers", metavar="CIPHERS", help="ciphers of TLS 1.2, as OpenSSL writes them")
    group.add_argument(
        "--disable-fastapi-docs", action=yes, default=False, help="do not serve /docs, /redoc and /openapi.json"
    )
    group.add_argument(
        "--headless", action=yes, default=False,
        help="serve nothing; accepted on hosts of node rank 1 and above, which follow host 0 with and without it",
    )  # fmt: skip
    levels = ("critical", "error", "warning", "info", "debug", "trace")
    group.add_argument("--uvicorn-log-level", choices=levels, default="info", help="least level that the server logs")


def _words(text: str) -> list[str]:
    """A word, or a JSON list of words."""
    return [str(word) for word in _json(text)] if text.startswith("[") else [text]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"not JSON: {text!r}") from None


def settings(arguments: argparse.Namespace, *, keys: tuple[str, ...], **environment: Any) -> ServerSettings:
    """The settings from the flags. keys: API keys from the environment, used if no flag gives any. environment: fields
    that have no flag."""
    return ServerSettings(
        names=tuple(arguments.served_model_name or (arguments.model,)),
        keys=tuple(arguments.api_key or keys),
        role=arguments.response_role,
        max_queue=arguments.max_queue,
        max_body_mb=arguments.max_body_mb,
        template_from_requests=arguments.trust_request_chat_template,
        content_format=arguments.chat_template_content_format,
        template_kwargs=dict(arguments.default_chat_template_kwargs),
        prompt_details=arguments.enable_prompt_tokens_details,
        always_usage=arguments.enable_force_include_usage,
        request_id_headers=arguments.enable_request_id_headers,
        origins=tuple(itertools.chain(*arguments.allowed_origins)),
        origin_methods=tuple(itertools.chain(*arguments.allowed_methods)),
        origin_headers=tuple(itertools.chain(*arguments.allowed_headers)),
        credentials=arguments.allow_credentials,
        closed_objects=(getattr(arguments, "structured_outputs_config", None) or {}).get(
            "disable_additional_properties"
        ),
        api_docs=not arguments.disable_fastapi_docs,
        tool_parser=None if arguments.tool_call_parser == "none" else arguments.tool_call_parser,
        reasoning_parser=None if arguments.reasoning_parser == "none" else arguments.reasoning_parser,
        traces_endpoint=arguments.otlp_traces_endpoint,
        **environment,
    )


def check(arguments: argparse.Namespace) -> None:
    """ValueError for flags that would otherwise fail only after the model is loaded."""
    if arguments.headless and not getattr(arguments, "node_rank", 0):
        raise ValueError("--headless: host 0 serves; give it to those with --node-rank 1 and above, or to none")
    for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
        file = getattr(arguments, name)
        if file is not None and not Path(file).is_file():
            raise ValueError(f"--{name.replace('_', '-')}: there is no file {file}")
    if arguments.ssl_keyfile and not arguments.ssl_certfile:
        raise ValueError("--ssl-keyfile needs --ssl-certfile")
    if arguments.otlp_traces_endpoint is not None:
        tracing.check(arguments.otlp_traces_endpoint)
    if not 0 <= arguments.port < 2**16:
        raise ValueError(f"--port {arguments.port}: ports end at 65535")


def _logging(level: str) -> dict[str, Any]:
    """Logging of uvicorn, with times, and of mmjax, which logs one line per request."""
    chosen: dict[str, Any] = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    chosen["formatters"]["default"]["fmt"] = "%(asctime)s %(levelprefix)s %(message)s"
    level = "DEBUG" if level == "trace" else level.upper()
    chosen["loggers"]["mmjax"] = {"handlers": ["default"], "level": level, "propagate": False}
    return chosen


def run(arguments: argparse.Namespace, engine: Mapping[str, Any], chosen: ServerSettings, keep_alive: int) -> None:
    """Load the model and serve it until the process gets a signal. Running requests may then finish."""
    check(arguments)
    log = _logging(arguments.uvicorn_log_level)
    logging.config.dictConfig(log)
    llm = LLM.for_server(arguments.model, **engine)
    app = create_app(AsyncLLM(llm), chosen)
    uvicorn.run(
        app,
        host=arguments.host,
        port=arguments.port,
        uds=arguments.uds,
        root_path=arguments.root_path,
        log_config=log,
        log_level=arguments.uvicorn_log_level,
        access_log=False,
        timeout_keep_alive=keep_alive,
        timeout_graceful_shutdown=arguments.drain_timeout,
        ssl_keyfile=arguments.ssl_keyfile,
        ssl_certfile=arguments.ssl_certfile,
        ssl_ca_certs=arguments.ssl_ca_certs,
        ssl_cert_reqs=arguments.ssl_cert_reqs,
        ssl_ciphers=arguments.ssl_ciphers,
    )
