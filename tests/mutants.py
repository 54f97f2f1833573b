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
    ("schedule not saved", "arsam/saving.py", "optimizer.sampling.load_state_dict(deepcopy(own[\"sampling\"]))", "pass",
     OPTIMIZER + "test_resume_is_bitwise"),
    ("PSF not saved", "arsam/saving.py", 'for i, x in kept.items()}', 'for i, x in kept.items() if False}',
     OPTIMIZER + "test_resume_is_bitwise"),
    ("PSF reversed", "arsam/functional.py", "torch.sub(g_s, g, out=g)", "torch.sub(g, g_s, out=g)",
     OPTIMIZER + "test_mixed_gradient_on_each_age"),
    ("bucket not copied", "arsam/ascent.py", "gradient.detach().clone() if gradient._is_view() else gradient.detach()",
     "gradient.detach()", OPTIMIZER + "test_gradient_that_is_a_view_is_copied"),
    ("one rho for all groups", "arsam/ascent.py", 'scale = rho / (norm + eps)',
     'scale = groups[0][1] / (norm + eps)', OPTIMIZER + "test_arsam_equals_its_restatement"),
    ("quota off by one", "arsam/sampling/adaptive.py", "left >= self.window - n % self.window",
     "left > self.window - n % self.window", "tests/arsam/test_sampling.py::test_every_full_window_has_its_quota"),
    ("budget starts late", "arsam/sampling/rules.py", "n * self._ascents % self._steps < self._ascents",
     "(n + 1) * self._ascents % self._steps < self._ascents", "tests/arsam/test_sampling.py::test_budget_is_met"),
    ("spacing not followed", "arsam/reuse.py", "max(spacing, 10.0)", "10.0",
     OPTIMIZER + "test_rivals_equal_their_restatement"),
    ("queues from all norms", "arsam/sampling/adaptive.py", "ordered = sorted(values)", "ordered = list(values)",
     OPTIMIZER + "test_arsam_equals_its_restatement"),
    ("masks drawn anew in the closure", "arsam/second_pass.py", "before.restore()", "pass",
     "tests/arsam/test_second_pass.py::test_random_numbers_are_those_of_the_first_pass"),
    ("masks drawn anew by hand", "arsam/second_pass.py", "stack.enter_context(self._recording.replay(after))", "pass",
     "tests/arsam/test_second_pass.py::test_random_numbers_are_those_of_the_first_pass"),
    ("one mask for all micro-batches", "arsam/randomness.py", "self._calls[kind] = count + 1", "self._calls[kind] = count",
     "tests/arsam/test_second_pass.py::test_random_numbers_are_those_of_the_first_pass"),
    ("a metric's masks", "arsam/second_pass.py", "kind = torch.is_grad_enabled(), module.training", "kind = True, True",
     "tests/arsam/test_second_pass.py::test_calls_that_the_passes_do_not_share"),
    ("a skipped batch's masks", "arsam/randomness.py", "(kind[0] and n < counts[kind])", "False",
     "tests/arsam/test_second_pass.py::test_a_batch_that_was_skipped_is_told"),
    ("two draws of MixUp", "arsam/randomness.py", "if self._strayed:", "if False:",
     "tests/arsam/test_second_pass.py::test_what_is_drawn_before_the_model_is_told"),
    ("a backbone's statistics", "arsam/second_pass.py", "if not self._looked and", "if self.model is None and",
     "tests/arsam/test_second_pass.py::test_statistics_of_another_module_are_told"),
    ("a clipping hook's norm taken", "arsam/wrapper.py", "if isinstance(result, tuple):", "if result is not None:",
      "tests/arsam/test_loops.py::test_a_clipping_hook_may_return_its_norm"),
    ("generators two passes on", "arsam/second_pass.py", "after.restore()", "pass",
     "tests/arsam/test_second_pass.py::test_generators_go_on_as_after_one_pass"),
    ("copies of half precision kept", "arsam/second_pass.py", "torch.clear_autocast_cache()", "pass",
     "tests/arsam/test_second_pass.py::test_autocast_around_both_passes"),
    ("another optimizer's gradient doubled", "arsam/second_pass.py", "stack.enter_context(gradients_aside(others))", "pass",
     "tests/arsam/test_second_pass.py::test_another_optimizer_of_the_same_model_has_its_own_gradient"),
    ("buffers not put back", "arsam/statistics.py", "buffer.put_back()", "pass",
     "tests/arsam/test_second_pass.py::test_buffers_are_put_back"),
    ("pending ascent dropped", "arsam/optimizer.py", "pending = self._pending\n", "pending = self._pending = None\n",
     "tests/arsam/test_loops.py::test_a_closure_that_does_nothing_after_perturb"),
    ("gradients grow unseen", "arsam/optimizer.py", "if growth.grown:", "if False:",
     "tests/arsam/test_loops.py::test_gradients_that_grow_in_the_closure"),
    ("an empty second pass steps", "arsam/optimizer.py", "if ascent.lost:", "if False:",
     "tests/arsam/test_loops.py::test_a_second_pass_without_a_gradient"),
    ("told at the first ascent only", "arsam/optimizer.py", "if not self._asked and", "if False and",
     "tests/arsam/test_loops.py::test_a_loop_that_knows_nothing_of_ascents"),
    ("a PSF of NaN kept", "arsam/functional.py", "if spoilt else", "if False else",
     "tests/arsam/test_loops.py::test_a_second_pass_that_is_not_finite_is_not_kept"),
    ("PSF not bounded", "arsam/reuse.py", "bound.clamp(max=share)", "torch.full_like(bound, share)",
     "tests/arsam/test_loops.py::test_max_ratio_bounds_what_is_reused"),
    ("outliers kept by default", "arsam/reuse.py", '(4.0 if beta == "auto" else None)', "None",
     "tests/arsam/test_loops.py::test_an_outlier_on_an_ascent_does_not_rule_the_steps_after_it"),
    ("the published form bounded", "arsam/reuse.py", '(4.0 if beta == "auto" else None)', "4.0",
     "tests/arsam/test_loops.py::test_an_outlier_on_an_ascent_does_not_rule_the_steps_after_it"),
    ("an outlier replayed", "arsam/ascent.py", "size > growth * before", "size > 1e9 * before",
     "tests/arsam/test_loops.py::test_an_outlier_on_an_ascent_does_not_rule_the_steps_after_it"),
    ("the last length not saved", "arsam/saving.py", "None if length is None else", "None and",
     "tests/arsam/test_loops.py::test_an_outlier_on_an_ascent_does_not_rule_the_steps_after_it"),
    ("other settings accepted", "arsam/saving.py", "if saved != (rules if named else",
     "if False and saved != (rules if named else",
     "tests/arsam/test_loops.py::test_other_settings_of_the_rules_are_refused"),
    ("a radius judged by the PSF alone", "arsam/watch.py", "[(ratio, *_RATIO), (rise, *_RISE)]", "[(ratio, *_RATIO)]",
     "tests/arsam/test_loops.py::test_one_sign_alone_does_not_tell_of_a_radius"),
    ("warm-up of rho lost", "arsam/schedule.py", "self._steps / self.rho_warmup", "1.0",
     "tests/arsam/test_loops.py::test_rho_rises"),
    ("a base's own rho taken", "arsam/schedule.py", "if old in group and old not in theirs:", "if old in group:",
     "tests/arsam/test_loops.py::test_a_base_with_a_rho_of_its_own"),
    ("ascent left on a wrapper", "arsam/optimizer.py", "if self._own() is not self:", "if False:",
     "tests/arsam/integrations/test_fabric.py::test_equals_the_plain_loop"),
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
        for part in ("arsam", "benchmarks", "examples", "tests", "pyproject.toml"):
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
