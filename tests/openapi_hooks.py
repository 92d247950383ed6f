"""What schemathesis is not to send: it loads this by name (SCHEMATHESIS_HOOKS) into a process of its own."""

import schemathesis


@schemathesis.hook
def filter_case(context: schemathesis.HookContext, case: schemathesis.Case) -> bool:
    """A form cannot say an empty list: the field is left out then, and that is allowed."""
    if case.media_type != "multipart/form-data" or not isinstance(case.body, dict):
        return True
    return [] not in case.body.values()
