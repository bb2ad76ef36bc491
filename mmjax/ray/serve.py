"""The server as a Ray Serve deployment: each replica is an engine under mmjax's own routes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from mmjax import LLM, AsyncLLM
from mmjax.cli.main import server_settings
from mmjax.config import EngineArgs
from mmjax.ray.resources import actor_options, needs_ray, num_seqs
from mmjax.serve import command
from mmjax.serve.app import create_app
from mmjax.serve.context import ServerSettings

# Flags of `mmjax serve` for the process that listens, which is Ray's proxy here.
OF_THE_PROXY = {
    *("host", "port", "uds", "root_path", "uvicorn_log_level", "drain_timeout", "headless"),
    *("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers"),
}
LISTS = ("served_model_name", "api_key")
NESTED_LISTS = ("allowed_origins", "allowed_methods", "allowed_headers")
DRAIN_S = 600.0
"""How long a replica that is removed may finish its requests: more than the longest takes, since one that has none
stops at once."""


class Replica:
    """One engine with its server. server, engine: keywords of `deployment`, by what they are for."""

    def __init__(self, model: str, server: Mapping[str, Any], engine: Mapping[str, Any]) -> None:
        self.settings = settings(model, server)
        self.engine = AsyncLLM(LLM.for_server(model, **engine))

    def __serve_build_asgi_app__(self) -> Any:
        """The ASGI application; Ray Serve calls this once."""
        return create_app(self.engine, self.settings)

    def check_health(self) -> None:
        """EngineDeadError if the engine has stopped: Ray Serve then starts another replica in its place."""
        self.engine.check()


def deployment(
    model: str,
    *,
    accelerator_type: str | None = None,
    deployment_config: Mapping[str, Any] | None = None,
    **flags: Any,
) -> Any:
    """A `ray.serve.Deployment` of mmjax's server: `serve.run(deployment("demo").bind())`.

    accelerator_type: as in `ray.serve.llm.LLMConfig`, "H100" or "TPU-V6E", of which a replica gets
    tensor_parallel_size * data_parallel_size; None for the CPU. deployment_config: options of `serve.deployment`, such
    as autoscaling_config and ray_actor_options. flags: those of `mmjax serve` as keywords, for engine and server.

    Unless deployment_config says otherwise, a replica takes twice as many requests as it decodes together, autoscaling
    aims at as many as it decodes together, and a replica that is removed has ten minutes to finish its requests.
    Raises ImportError without Ray, TypeError for an unknown keyword, ValueError for a bad value.
    """
    with needs_ray():
        from ray import serve
    server, engine = split_flags(flags)
    args = EngineArgs.of(model, **{name: engine[name] for name in engine if name != "allowed_local_media_path"})
    wanted = dict(deployment_config or {})
    actor = actor_options(args, accelerator_type, wanted.get("ray_actor_options", {}))
    batch = num_seqs(args, actor)
    options: dict[str, Any] = {
        "name": "mmjax",
        "max_ongoing_requests": 2 * batch,
        "graceful_shutdown_timeout_s": DRAIN_S,
        **wanted,
        "ray_actor_options": actor,
    }
    if isinstance(wanted.get("autoscaling_config"), Mapping):
        options["autoscaling_config"] = {"target_ongoing_requests": batch, **wanted["autoscaling_config"]}

    class Server(Replica):
        """A `Replica` with these arguments, so that `bind()` takes none."""

        def __init__(self) -> None:
            super().__init__(model, server, engine)

    return serve.deployment(**options)(serve.ingress()(Server))


def build_openai_app(arguments: Mapping[str, Any]) -> Any:
    """A bound deployment for a Serve config file: `import_path: mmjax.ray:build_openai_app`, with the keywords of
    `deployment` under `args`."""
    given = dict(arguments)
    if "model" not in given:
        raise ValueError("args: which model? Name a directory, a hub id, or `demo`, as `model`")
    return deployment(given.pop("model"), **given).bind()


def settings(model: str, server: Mapping[str, Any]) -> ServerSettings:
    """The settings of a replica's server, from the flags for it and the environment of its process."""
    chosen: ServerSettings = server_settings(argparse.Namespace(**{**_server_defaults(), **server, "model": model}))
    return chosen


def _server_defaults() -> dict[str, Any]:
    """The flags of the server with their defaults."""
    parser = argparse.ArgumentParser()
    command.add_flags(parser)
    return vars(parser.parse_args([]))


def split_flags(flags: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keywords for the server, in the form that its flags have when they are parsed, and those for the engine."""
    known = _server_defaults()
    if refused := sorted(OF_THE_PROXY & set(flags)):
        raise ValueError(
            f"{', '.join(refused)}: Ray's proxy listens here; set http_options of `serve.start`, and "
            "graceful_shutdown_timeout_s in deployment_config for drain_timeout."
        )
    server = {name: value for name, value in flags.items() if name in known}
    for name in {*LISTS, *NESTED_LISTS} & set(server):
        values = [server[name]] if isinstance(server[name], str) else list(server[name])
        server[name] = values if name in LISTS else [values]
    return server, {name: value for name, value in flags.items() if name not in known}
