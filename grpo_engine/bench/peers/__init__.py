"""Who does the same job: one file per package. Each lists its providers as ``PROVIDERS`` and
imports its host only inside functions, so that listing them needs none of them installed."""
