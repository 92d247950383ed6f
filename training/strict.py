"""The base of everything that a recipe may say: frozen, and an unknown key is an error, told in words."""

from pydantic import BaseModel, ConfigDict, ValidationError


class Strict(BaseModel):
    """A part of a recipe. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def faults_in(error: ValidationError, whole: str, *above: str) -> str:
    """Every fault in words, each behind the path of its field, `above` that stands before all these paths.

    `whole` is what a fault stands behind that is of no single field.
    """
    return "; ".join(
        f"{'.'.join(map(str, (*above, *fault['loc']))) or whole}: {fault['msg']}" for fault in error.errors()
    )
