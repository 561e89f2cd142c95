"""What verl imports through the entry point group ``verl.plugins``: registers on import.

verl logs a plug-in's error where nobody sees it (level DEBUG), so it is said here, too.
"""

import os
import warnings

from grpo_engine.integrations.verl import LOGPROBS_VARIABLE, patch_verl, register

try:
    register()
    if os.environ.get(LOGPROBS_VARIABLE, "0") == "1":
        patch_verl()
except Exception as error:
    warnings.warn(f"grpo_engine is not registered with verl: {error}", stacklevel=1)
    raise
