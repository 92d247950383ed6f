"""Send the log of a run to a service that people watch, beside log.jsonl."""

from importlib.util import find_spec

from training.config import RecipeError

# What has to be there: any one of these packages.
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}


def require_reporter(name: str) -> None:
    """Raises RecipeError when the package behind `report_to: NAME` is not installed."""
    wanted = PACKAGES.get(name, ())
    if wanted and not any(find_spec(package) for package in wanted):
        raise RecipeError(
            f"report_to: {name} needs the package {wanted[0]}, which is not installed: pip install {wanted[0]} into "
            "this environment, or say report_to: none; the log is in log.jsonl and curves.png of the stage either way"
        )
