"""One sentence for an error that several ranks of a machine meet, such as unsuitable shards.

The launcher makes a folder; the first rank to claim an error there says it. Ranks with another
error say theirs too.
"""

import hashlib
import os
from pathlib import Path

ERRORS_VARIABLE = "RECTVLM_ERRORS_OF_RANKS"
"""Variable that names the folder in which the ranks of a machine claim errors."""


def claim_error(message: str) -> bool:
    """Whether this rank is the one to say an error: the first of its machine to meet it."""
    folder = os.environ.get(ERRORS_VARIABLE)
    if folder is None:
        return True
    try:
        (Path(folder) / hashlib.sha256(message.encode()).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True  # twice is better than not at all
    return True
