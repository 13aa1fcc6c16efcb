"""Task scores by lm-evaluation-harness, on a model that is loaded already.

The harness's own defaults (no chat template, its seeds), so that its figures
equal those of its command line. It is an extra: pip install 'safecrit[eval]'.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safecrit.errors import SafecritError

if TYPE_CHECKING:
    from safecrit.models import LoadedModel


def check_tasks(tasks: Sequence[str]) -> None:
    """SafecritError where the harness is not installed or does not know a task; files are read."""
    _resolve(tasks)


def run_tasks(loaded: LoadedModel, tasks: Sequence[str], *, limit: int | None, batch_size: int) -> dict[str, Any]:
    """Scores by task and metric, as the harness names them (`acc,none`), and how many examples each has.

    `tasks`: names the harness knows, or YAML files of tasks. `limit`: examples a
    task. Raises SafecritError for unknown tasks and where the harness fails to
    load a task's data.
    """
    found = _resolve(tasks)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model = HFLM(
        pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size, device=str(loaded.model.device)
    )
    try:
        results = lm_eval.simple_evaluate(model=model, tasks=found, limit=limit, log_samples=False, verbosity="ERROR")
    except (OSError, ValueError, KeyError) as error:
        raise SafecritError(
            f"--tasks {','.join(tasks)}: the harness failed ({type(error).__name__}: {error})."
        ) from error
    assert results is not None
    counts = results.get("n-samples", {})
    return {
        "harness": lm_eval.__version__,
        "limit": limit,
        "results": {
            task: {
                "examples": counts.get(task, {}).get("effective"),
                **{key: float(value) for key, value in sorted(metrics.items()) if _is_number(value)},
            }
            for task, metrics in sorted(results["results"].items())
        },
    }


def _resolve(tasks: Sequence[str]) -> list[Any]:
    """Task names and the content of task files, in the harness's terms."""
    try:
        from lm_eval.tasks import TaskManager
        from lm_eval.tasks._yaml_loader import load_yaml
    except ImportError as error:
        raise SafecritError("--tasks needs lm-evaluation-harness: pip install 'safecrit[eval]'.") from error
    known = TaskManager().all_tasks
    found: list[Any] = []
    for task in tasks:
        if Path(task).suffix in (".yaml", ".yml"):
            if not Path(task).is_file():
                raise SafecritError(f"--tasks {task}: no such file.")
            found.append(load_yaml(Path(task), resolve_func=True))
        elif task in known:
            found.append(task)
        else:
            raise SafecritError(f"--tasks {task}: the harness knows no such task. `lm_eval ls tasks` lists them.")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
