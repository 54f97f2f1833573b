"""Break the optimizer in known ways, and see that a named test notices each: python tests/mutants.py.

Each mutant is one textual change of the source and the test that must fail on it. Runs on a copy; the source stays.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPTIMIZER = "tests/arsam/test_optimizer.py::"

# name, file, what is replaced, by what, the test that kills it
MUTANTS = [
    ("no-op ascent", "arsam/ascent.py", 'scale = rho / (norm + eps)', 'scale = 0.0 * rho / (norm + eps)',
     OPTIMIZER + "test_equals_textbook_sam"),
    ("reversed sign", "arsam/ascent.py", 'scale = rho / (norm + eps)', 'scale = -rho / (norm + eps)',
     OPTIMIZER + "test_ascent_raises_the_loss"),
    ("per-group norm", "arsam/ascent.py", 'scale = rho / (norm + eps)',
     'scale = rho / (functional.global_norm(xs) + eps)', OPTIMIZER + "test_length_of_the_perturbation"),
    ("skipped restore", "arsam/ascent.py", "functional.copy_(list(saved), list(saved.values()))", "pass",
     OPTIMIZER + "test_exception_in_the_second_pass"),
    ("subtraction instead of copy", "arsam/ascent.py", "functional.copy_(list(saved), list(saved.values()))",
     "torch._foreach_sub_(weights, [(w - s) * (1 + 1e-6) for w, s in saved.items()])",
     OPTIMIZER + "test_restore_is_bitwise_after_every_ascent"),
    ("replaced storage", "arsam/ascent.py", "functional.copy_(list(saved), list(saved.values()))",
     "[setattr(w, 'data', s) for w, s in saved.items()]", OPTIMIZER + "test_exception_in_the_second_pass"),
    ("closure run on one-pass steps", "arsam/optimizer.py", "            if self._pending is None and self._is_due():",
     "            if not self._is_due():\n                with torch.enable_grad():\n                    closure()\n"
     "            elif self._pending is None:", OPTIMIZER + "test_one_pass_steps_call_the_closure_once"),
    ("loss of the wrong pass", "arsam/optimizer.py", "second = closure()", "second = loss = closure()",
     OPTIMIZER + "test_loss_is_that_of_the_first_pass"),
    ("float horizon", "arsam/optimizer.py", "if self._age == self.reuse.horizon:",
     "if self.reuse.horizon and 0.7**self._age <= 0.7**self.reuse.horizon * 0.7:",
     OPTIMIZER + "test_mixed_gradient_on_each_age"),
    ("statistics moved", "arsam/second_pass.py", "stack.enter_context(frozen_statistics(self.model))", "pass",
     OPTIMIZER + "test_batch_norm_as_if_the_second_pass_had_not_been"),
    ("schedule not saved", "arsam/optimizer.py", "self.sampling.load_state_dict(deepcopy(own[\"sampling\"]))", "pass",
     OPTIMIZER + "test_resume_is_bitwise"),
    ("PSF not saved", "arsam/optimizer.py", 'for i, x in kept.items()}', 'for i, x in kept.items() if False}',
     OPTIMIZER + "test_resume_is_bitwise"),
    ("PSF reversed", "arsam/functional.py", "torch.sub(g_s, g, out=g)", "torch.sub(g, g_s, out=g)",
     OPTIMIZER + "test_mixed_gradient_on_each_age"),
    ("bucket not copied", "arsam/ascent.py", "gradient.detach().clone() if gradient._is_view() else gradient.detach()",
     "gradient.detach()", OPTIMIZER + "test_gradient_that_is_a_view_is_copied"),
    ("one rho for all groups", "arsam/ascent.py", 'scale = rho / (norm + eps)',
     'scale = groups[0][1] / (norm + eps)', OPTIMIZER + "test_a_group_with_rho_zero_stays_where_it_is"),
    ("quota off by one", "arsam/sampling/adaptive.py", "left >= self.window - n % self.window",
     "left > self.window - n % self.window", "tests/arsam/test_sampling.py::test_every_full_window_has_its_quota"),
    ("budget starts late", "arsam/sampling/rules.py", "n * self._ascents % self._steps < self._ascents",
     "(n + 1) * self._ascents % self._steps < self._ascents", "tests/arsam/test_sampling.py::test_budget_is_met"),
    ("spacing not followed", "arsam/reuse.py", "max(spacing, 10.0)", "10.0",
     OPTIMIZER + "test_rivals_equal_their_restatement"),
    ("queues from all norms", "arsam/sampling/adaptive.py", "ordered = sorted(values)", "ordered = list(values)",
     OPTIMIZER + "test_arsam_equals_its_restatement"),
]  # fmt: skip


def killed(folder: Path, file: str, old: str, new: str, test: str) -> bool:
    """Apply the mutant in the copy, run its test, put the source back."""
    path = folder / file
    source = path.read_text()
    if source.count(old) != 1:
        raise SystemExit(f"{file}: expected exactly one place that reads {old!r}; the mutant needs a new text")
    path.write_text(source.replace(old, new))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", test]
    code = subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode
    path.write_text(source)
    if code not in (0, 1):
        raise SystemExit(f"{test}: pytest ended with {code}: the test did not run")
    return code == 1


def main() -> None:
    """Run all; exit with 1 if one survives."""
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("arsam", "tests", "pyproject.toml"):
            source = ROOT / part
            shutil.copytree(source, folder / part) if source.is_dir() else shutil.copy(source, folder / part)
        for title, file, old, new, test in MUTANTS:
            dead = killed(folder, file, old, new, test)
            survivors += not dead
            print(f"{'killed  ' if dead else 'SURVIVED'}  {title:30}  {test}", flush=True)
    print(f"{len(MUTANTS) - survivors} passed, {survivors} failed")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
