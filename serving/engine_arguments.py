"""Flags for vLLM that a person may add, less those that would open what the gateway keeps shut."""

import shlex

from serving.engine import EngineError

# The flag (without dashes) -> why nobody may give it, or what to use in its place.
REFUSED = {
    "host": "vLLM listens to the gateway alone",
    "port": "the gateway chooses it",
    "uds": "the gateway reaches it by a port",
    "root-path": "the gateway knows where it is",
    "api-key": "each start has a key of its own",
    "ssl-keyfile": "vLLM listens on this machine alone",
    "ssl-certfile": "vLLM listens on this machine alone",
    "model": "give the model as MODEL",
    "model-tag": "give the model as MODEL",
    "served-model-name": "the name follows from MODEL",
    "tokenizer": "the gateway reads the model's own, to keep typed words plain text",
    "tokenizer-mode": "the gateway reads the model's own, to keep typed words plain text",
    "chat-template": "the template belongs to the model folder (chat_template.jinja)",
    "trust-request-chat-template": "no request brings a template",
    "default-chat-template-kwargs": "the template belongs to the model folder (chat_template.jinja)",
    "trust-remote-code": "no code of a checkpoint is run",
    "load-format": "weights are read as safetensors only, which hold no code",
    "model-loader-extra-config": "weights are read as safetensors only, which hold no code",
    "middleware": "it would run code beside the key",
    "logits-processors": "it would run code of another place",
    "worker-cls": "it would run code of another place",
    "worker-extension-cls": "it would run code of another place",
    "tool-parser-plugin": "it would run code of another place",
    "reasoning-parser-plugin": "it would run code of another place",
    "allowed-media-domains": "the gateway fetches pictures (--allow-pictures-from)",
    "allowed-local-media-path": "no request reads a file",
    "limit-mm-per-prompt": "the gateway limits pictures",
    "enable-log-requests": "words of people are not written down (--log-content does)",
    "enable-log-outputs": "words of people are not written down (--log-content does)",
    "lora-modules": "adapters are checked first (--adapter NAME=FOLDER)",
    "default-mm-loras": "adapters are checked first (--adapter NAME=FOLDER)",
    "enable-tower-connector-lora": "vLLM computes adapters on tower and projector wrongly; merge them (kangaroo merge)",
    "allowed-origins": "the gateway has --allow-origin",
    "allow-credentials": "the gateway has --allow-origin",
    "config": "it may hold any of the flags that are refused; write the flags themselves",
    "headless": "the gateway needs vLLM's API",
    "grpc": "the gateway needs vLLM's API",
}


def parse_engine_arguments(text: str) -> list[str]:
    """The flags in `text`, split as a shell does.

    Raises:
        EngineError: it holds something that is no flag, or one that is refused; the message names it and says why.
    """
    try:
        arguments = shlex.split(text)
    except ValueError as error:
        raise EngineError(f"--engine-args {text!r} cannot be read: {error}.") from error
    if arguments and not arguments[0].startswith("-"):
        raise EngineError(f"--engine-args starts with {arguments[0]!r}, which is no flag (--name value).")
    for argument in arguments:
        if (reason := refusal(argument)) is not None:
            raise EngineError(f"--engine-args may not hold {argument.partition('=')[0]}: {reason}.")
    return arguments


def refusal(argument: str) -> str | None:
    """Why `argument` may not be given; None for what may, and for values.

    vLLM takes underscores for dashes, `--no-` before a switch and `.field` behind a structured one. What begins a
    refused name is refused too, should it ever be taken for the whole.
    """
    if not argument.startswith("--"):
        return None
    name = argument[2:].partition("=")[0].partition(".")[0].replace("_", "-").lower().removeprefix("no-")
    if not name:
        return "it ends the flags"
    return next((reason for refused, reason in REFUSED.items() if refused.startswith(name)), None)
