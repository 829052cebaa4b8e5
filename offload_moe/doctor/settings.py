"""The user's own defaults of the command line."""

from offload_moe.doctor.check import Check, judge
from offload_moe.errors import ConfigError
from offload_moe.system.settings import UNSET, read_settings


def check_settings() -> Check:
    """Check the file and the variables of `offload-moe config`."""
    try:
        chosen = read_settings()
    except ConfigError as error:
        return judge("config", "not usable", problem=str(error))
    named = [f"{name} {found.text} ({found.origin})" for name, found in chosen.items() if found.origin != UNSET]
    return judge("config", ", ".join(named) or "no defaults are set")
