"""The programs that read the files under serving/deploy and the commands of docs/scale.md understand what they say."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from typer.testing import CliRunner

from serving import supervisor
from serving.access import OPEN_PATHS
from serving.doors import SECONDS_TO_DRAIN
from serving.engine_arguments import parse_engine_arguments
from serving.gateway import create_gateway
from serving.model_folder import ModelFacts, read_model_folder
from serving.server import SECONDS_FOR_PAGES
from serving.vllm_program import vllm_command, vllm_environment
from tests.small_engine import SmallEngine
from tests.test_house import ROOT
from ui.command_line import app
from ui.commands import serving as serving_commands

DEPLOY = ROOT / "serving" / "deploy"
COMPOSE = sorted(DEPLOY.glob("compose*.yaml"))
KUSTOMIZATIONS = sorted(DEPLOY.glob("kubernetes/*/kustomization.yaml"))
DOCUMENT = ROOT / "docs" / "scale.md"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
VLLM = ["vllm.entrypoints.cli.main", "serve"]
# What an engine of its own gets from the gateway by the machine and the model, and one elsewhere from who starts it.
OF_THE_PLACE = {"--model", "--served-model-name", "--host", "--port", "--dtype", "--model-impl", "--max-model-len"}
OF_CPUS = {"--enforce-eager", "--block-size"}  # and these containers have GPUs


class Container(NamedTuple):
    """What one container runs, of a compose file or of Kubernetes; `name` is for messages."""

    name: str
    image: str
    words: list[str]  # those after `kangaroo` where it runs that, or else the whole command
    said: dict[str, Any]


def filled_in(said: str) -> str:
    """`said` with compose's variables at their defaults; one that must be given is `given`."""
    return re.sub(r"\$\{\w+(?::-([^}]*)|:\?[^}]*)\}", lambda found: "given" if found[1] is None else found[1], said)


def of_compose(file: Path) -> Iterator[Container]:
    for name, said in yaml.safe_load(filled_in(file.read_text()))["services"].items():
        words = [*said.get("entrypoint", []), *said.get("command", [])]
        yield Container(f"{file.name}: {name}", said["image"], words, said)


def resources_of(kustomization: Path) -> list[dict[str, Any]]:
    """Every resource that the kustomization names, as it stands there."""
    names = yaml.safe_load(kustomization.read_text())["resources"]
    return [said for name in names for said in yaml.safe_load_all((kustomization.parent / name).read_text())]


def of_kubernetes(kustomization: Path) -> Iterator[Container]:
    for resource in resources_of(kustomization):
        if resource["kind"] == "Deployment":
            for said in resource["spec"]["template"]["spec"]["containers"]:
                words = [*said.get("command", []), *said.get("args", [])]
                yield Container(f"{kustomization.parent.name}: {said['name']}", said["image"], words, said)


CONTAINERS = [
    *(container for file in COMPOSE for container in of_compose(file)),
    *(container for file in KUSTOMIZATIONS for container in of_kubernetes(file)),
]
GATEWAYS = [one for one in CONTAINERS if one.words[:1] == ["serve"]]
ENGINES = [one for one in CONTAINERS if VLLM[0] in one.words]


def name_of(container: Container) -> str:
    return container.name


def said_commands(document: Path) -> list[list[str]]:
    """The commands in the document's shell blocks, with continued lines joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def without_variables(words: Sequence[str]) -> list[str]:
    """The command itself: what is set for it alone stands before it as NAME=value."""
    return [word for place, word in enumerate(words) if "=" not in word or any("=" not in w for w in words[:place])]


DOCUMENTED = [without_variables(words) for words in said_commands(DOCUMENT)]


def served(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> serving_commands.Options:
    """What the command `kangaroo` makes of `words`, up to the server, which is not started."""
    seen: list[serving_commands.Options] = []
    monkeypatch.setattr(serving_commands, "run_server", lambda options, **more: seen.append(options))
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    [options] = seen
    return options


def flags_of(words: Sequence[str]) -> dict[str, str]:
    """Flags and their values, written with `=` or a space; a switch's value is empty."""
    flags: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            flags[name] = value
        elif name:
            flags[name] = word
    return flags


def test_the_files_are_what_the_tests_look_at() -> None:
    assert [one.name for one in GATEWAYS] == [
        "compose.engines.yaml: gateway",
        "compose.yaml: kangaroo",
        "engines: gateway",
        "one: kangaroo",
    ]
    assert [one.name for one in ENGINES] == ["compose.engines.yaml: engine", "engines: engine"]


@pytest.mark.parametrize("gateway", GATEWAYS, ids=name_of)
def test_our_own_command_line_takes_what_is_said(gateway: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    options = served(gateway.words, monkeypatch)
    assert options.host == "0.0.0.0", "a container that listens to itself alone"
    parse_engine_arguments(options.engine_arguments)
    if options.engine_key_env is not None:
        environment = gateway.said["environment" if "environment" in gateway.said else "env"]
        names = environment if isinstance(environment, dict) else [one["name"] for one in environment]
        assert options.engine_key_env in names


@pytest.mark.parametrize("words", [words for words in DOCUMENTED if words[:2] == ["kangaroo", "serve"]], ids=" ".join)
def test_our_own_command_line_takes_what_the_document_says(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_engine_arguments(served(words[1:], monkeypatch).engine_arguments) is not None


@pytest.mark.slow
def test_vllm_takes_every_flag_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of engines in containers, those that the document starts engines with, and what it gives our own."""
    commands = [one.words[one.words.index(VLLM[1]) + 1 :] for one in ENGINES]
    commands += [words[words.index(VLLM[1]) + 1 :] for words in DOCUMENTED if VLLM[0] in words]
    served_ones = [words[1:] for words in DOCUMENTED if words[:2] == ["kangaroo", "serve"]]
    commands += [parse_engine_arguments(served(words, monkeypatch).engine_arguments) for words in served_ones]
    program = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
for words in json.load(open(sys.argv[1])):
    said = parser.parse_args(words)
    print(json.dumps([said.data_parallel_size, said.tensor_parallel_size]))
"""
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "commands.json"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(sizes) == len(commands)
    assert sizes[: len(ENGINES)] == [[2, 1], [4, 1]]


@pytest.mark.parametrize("engine", ENGINES, ids=name_of)
def test_an_engine_in_a_container_is_guarded_as_one_of_our_own(engine: Container) -> None:
    """The gateway gives a vLLM of its own flags that keep it shut and small; one elsewhere needs the same."""
    facts = ModelFacts(Path("model"), "clip_vision_model", True, None, None)
    ours = flags_of(vllm_command(facts, "model", 1, "auto", most_pictures=8))
    theirs = flags_of(engine.words)
    for name in ours.keys() - OF_THE_PLACE - OF_CPUS:
        assert name in theirs, f"{engine.name} lacks {name}"
        if ours[name].startswith("{"):
            assert json.loads(theirs[name]) == json.loads(ours[name]), name
        else:
            assert theirs[name] == ours[name], name
    said = engine.said.get("environment") or {one["name"]: one.get("value") for one in engine.said["env"]}
    wanted = vllm_environment("key", most_pixels=20_000_000)
    for name in ("VLLM_NO_USAGE_STATS", "VLLM_MAX_IMAGE_PIXELS", "VLLM_MEDIA_URL_ALLOW_REDIRECTS"):
        assert said[name] == wanted[name]
    assert "VLLM_API_KEY" in said


@pytest.mark.parametrize("container", CONTAINERS, ids=name_of)
def test_probes_ask_routes_that_are_there(container: Container, monkeypatch: pytest.MonkeyPatch) -> None:
    if not container.words:
        return  # laid over another file
    port = flags_of(container.words)["--port"]
    routes = {"/health"}  # vLLM's
    if container in GATEWAYS:
        facts = read_model_folder(ROOT / "assistant" / "joey")
        routes = {getattr(route, "path", "") for route in create_gateway(SmallEngine(), "joey", facts).routes}
    said = json.dumps(container.said)
    asked = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)", said)
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        if http := container.said.get(probe, {}).get("httpGet"):
            [number] = [each["containerPort"] for each in container.said["ports"] if each["name"] == http["port"]]
            asked.append((str(number), http["path"]))
            assert http["path"] in OPEN_PATHS, "it would be asked for a key"
    assert asked, f"{container.name} has no probe"
    assert {each[0] for each in asked} == {port}
    assert {each[1] for each in asked} <= routes


@pytest.mark.parametrize("file", KUSTOMIZATIONS, ids=lambda file: str(file.parent.name))
def test_services_find_their_pods_and_gateways_their_engines(file: Path) -> None:
    resources = resources_of(file)
    pods = [one["spec"]["template"] for one in resources if one["kind"] == "Deployment"]
    services = {one["metadata"]["name"]: one["spec"] for one in resources if one["kind"] == "Service"}
    for service in services.values():
        [pod] = [pod for pod in pods if service["selector"].items() <= pod["metadata"]["labels"].items()]
        names = [port["name"] for container in pod["spec"]["containers"] for port in container["ports"]]
        assert [port["targetPort"] for port in service["ports"]] == names
    for gateway in of_kubernetes(file):
        if (url := flags_of(gateway.words).get("--engine-url")) is not None:
            name, port = url.removeprefix("http://").split(":")
            assert services[name]["ports"][0]["port"] == int(port)
        if (origin := flags_of(gateway.words).get("--allow-origin")) is not None:
            assert origin.removeprefix("http://") in services
    claims = {one["metadata"]["name"] for one in resources if one["kind"] == "PersistentVolumeClaim"}
    for pod in pods:
        volumes = {one["name"]: one for one in pod["spec"]["volumes"]}
        asked = {
            one["persistentVolumeClaim"]["claimName"] for one in volumes.values() if "persistentVolumeClaim" in one
        }
        assert asked <= claims
        everyone = [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
        assert {mount["name"] for container in everyone for mount in container["volumeMounts"]} == volumes.keys()
        for container in everyone:
            assert "/data" in [mount["mountPath"] for mount in container["volumeMounts"]]


@pytest.mark.parametrize("file", KUSTOMIZATIONS, ids=lambda file: str(file.parent.name))
def test_a_pod_is_killed_later_than_the_last_answer_ends(file: Path) -> None:
    for resource in resources_of(file):
        if resource["kind"] != "Deployment":
            continue
        pod = resource["spec"]["template"]["spec"]
        [container] = pod["containers"]
        kind, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
        assert kind == "sleep", "new requests come for a moment after the pod was told to end"
        answers = float(flags_of(container.get("args", [])).get("--shutdown-timeout", SECONDS_TO_DRAIN))
        engine = supervisor.SECONDS_TO_END_ITSELF if "--engine-url" not in container["args"] else 0
        assert pod["terminationGracePeriodSeconds"] >= float(seconds) + answers + SECONDS_FOR_PAGES + engine + 5


@pytest.mark.parametrize("file", COMPOSE, ids=lambda file: str(file.name))
def test_compose_kills_later_than_the_last_answer_ends(file: Path) -> None:
    for container in of_compose(file):
        if container.words[:1] == ["serve"]:
            seconds = float(container.said["stop_grace_period"].removesuffix("s"))
            assert seconds >= SECONDS_TO_DRAIN + SECONDS_FOR_PAGES + supervisor.SECONDS_TO_END_ITSELF + 5


def test_an_image_is_named_once() -> None:
    for file in KUSTOMIZATIONS:
        [named] = yaml.safe_load(file.read_text())["images"]
        assert {one.image for one in of_kubernetes(file)} == {named["name"]}
    for file in COMPOSE:
        assert len(re.findall(r"^ +image: ", file.read_text(), re.MULTILINE)) == 1


def test_the_dockerfile_agrees_with_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for sources in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
            assert f"!{source}\n" in (DEPLOY / "Dockerfile.dockerignore").read_text()
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {f"COPY {name} ./{name}" for name in packages["packages"]} <= set(DOCKERFILE.splitlines())
    assert f"COPY {project['readme']} LICENSE ./" in DOCKERFILE, "the build reads both"
    uv = re.search(r"^readonly UV_VERSION=(\S+)", (ROOT / "scripts" / "setup.sh").read_text(), re.MULTILINE)
    assert uv is not None and f"ARG UV_VERSION={uv[1]}\n" in DOCKERFILE
    extras = {extra for line in (DOCKERFILE, *(file.read_text() for file in COMPOSE)) for extra in extras_in(line)}
    assert extras == {"cpu", "cuda"} <= project["optional-dependencies"].keys()
    assert "FROM python:3.12-" in DOCKERFILE and project["requires-python"] == ">=3.11,<3.13"
    [user] = re.findall(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)
    for file in KUSTOMIZATIONS:
        for resource in resources_of(file):
            if resource["kind"] == "Deployment":
                assert resource["spec"]["template"]["spec"]["securityContext"]["runAsUser"] == int(user)
    said = re.search(r"^CMD (\[.+\])$", DOCKERFILE, re.MULTILINE)
    assert said is not None
    [port] = re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.MULTILINE)
    assert {port} == {flags_of(json.loads(said[1]))["--port"], *(flags_of(one.words)["--port"] for one in GATEWAYS)}


def extras_in(text: str) -> list[str]:
    """The builds of vLLM that a file says."""
    return re.findall(r"(?:EXTRA[=:] ?|KANGAROO_EXTRA:-)(\w+)", text)


def test_keys_are_where_the_server_looks_for_them() -> None:
    """Either the secret itself, or the place that it is copied to before the server starts."""
    for file in KUSTOMIZATIONS:
        for resource in resources_of(file):
            spec = resource["spec"].get("template", {}).get("spec", {})
            for container in spec.get("containers", []):
                if (place := flags_of(container["args"]).get("--keys")) is None:
                    continue
                copied = [word for one in spec.get("initContainers", []) for word in one["command"][-1].split()[-1:]]
                mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
                assert place in copied or str(Path(place).parent) in mounts


def test_the_default_command_of_the_image_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    said = re.search(r"^CMD (\[.+\])$", DOCKERFILE, re.MULTILINE)
    assert said is not None and served(json.loads(said[1]), monkeypatch).model is None


def judged(*command: str | Path) -> None:
    """Runs a validator; its words are the message where it complains."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def program(name: str) -> Path:
    """A validator beside this Python, or on the PATH; the test is skipped where there is none."""
    beside = Path(sys.executable).with_name(name)
    if beside.exists():
        return beside
    if (found := shutil.which(name)) is None:
        pytest.skip(f"no {name} at hand")
    return Path(found)


@pytest.mark.parametrize("file", COMPOSE, ids=lambda file: str(file.name))
def test_compose_files_follow_the_compose_specification(file: Path) -> None:
    """By the schema that comes with check-jsonschema: nothing is fetched."""
    judged(program("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", file)


@pytest.mark.parametrize("file", KUSTOMIZATIONS, ids=lambda file: str(file.parent.name))
def test_kubernetes_files_follow_kubernetes_own_schemas(file: Path, tmp_path: Path) -> None:
    """Every field of every resource, by the schemas that come with kubernetes-validate; unknown fields are refused."""
    if find_spec("kubernetes_validate") is None and shutil.which("kubernetes-validate") is None:
        pytest.skip("no kubernetes-validate at hand")
    everything = tmp_path / "everything.yaml"
    everything.write_text(yaml.safe_dump_all(resources_of(file)))
    judged(program("kubernetes-validate"), "--strict", everything)


@pytest.mark.parametrize("file", KUSTOMIZATIONS, ids=lambda file: str(file.parent.name))
def test_kubectl_builds_the_kustomization(file: Path) -> None:
    built = subprocess.run([program("kubectl"), "kustomize", file.parent], capture_output=True, text=True, timeout=60)
    assert built.returncode == 0, built.stderr
    kinds = sorted(one["kind"] for one in yaml.safe_load_all(built.stdout))
    assert kinds == sorted(one["kind"] for one in resources_of(file))
    assert set(re.findall(r"image: (\S+)", built.stdout)) == {"registry.example.org/kangaroo:cuda"}


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    judged(program("hadolint"), DEPLOY / "Dockerfile")
