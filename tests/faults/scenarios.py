"""What is done to runs: every scenario, for long.py, and some of each kind, for test_faults.py."""

from tests.faults import damage, surroundings

ALL = {
    "the last checkpoint": {
        damage.truncated: "cut to half",
        damage.emptied: "emptied",
        damage.flipped: "one bit flipped",
        damage.flipped_five_times: "another bit flipped, five times",
        damage.newest_deleted: "deleted",
        damage.half_deleted: "deleted, and the best state too",
        damage.all_flipped: "one bit flipped, in the one before too",
        damage.all_deleted: "the whole folder deleted",
    },
    "the best state": {damage.best_flipped: "one bit flipped", damage.best_deleted: "deleted"},
    "metrics.jsonl": {
        damage.metrics_shortened: "cut to half",
        damage.metrics_changed: "one digit changed",
        damage.metrics_deleted: "deleted",
    },
    "config.json": {damage.config_truncated: "cut to half", damage.config_deleted: "deleted"},
    "environment.json": {damage.environment_truncated: "cut to half", damage.environment_deleted: "deleted"},
    "result.json": {damage.result_truncated: "cut to half", damage.result_emptied: "emptied"},
    "compiled programs": {damage.compiled_truncated: "cut to half"},
    "disk full": {
        surroundings.full_at_checkpoint: "at a checkpoint",
        surroundings.full_at_metrics: "at the metrics",
        surroundings.full_at_result: "at the result",
        surroundings.full_at_report: "at the report",
    },
    "disk read-only": {surroundings.read_only: "a run that goes on, a new one, a report"},
    "clock": {
        surroundings.clock_behind: "a year behind",
        surroundings.clock_jumps: "a year ahead, a year behind, right again, in one run",
    },
    "another process": {surroundings.second_process: "on the same run; then the first is killed"},
    "another launcher": {surroundings.second_launcher: "on the same working folder"},
    "older code": {
        surroundings.other_format: "another format of run folders",
        surroundings.other_code: "the same format",
    },
}
"""What is harmed -> scenario -> how."""

SHORT = (
    damage.truncated,
    damage.flipped,
    damage.half_deleted,
    damage.best_flipped,
    damage.metrics_changed,
    damage.config_deleted,
    damage.result_truncated,
    damage.compiled_truncated,
    surroundings.full_at_checkpoint,
    surroundings.full_at_metrics,
    surroundings.full_at_result,
    surroundings.full_at_report,
    surroundings.read_only,
    surroundings.clock_jumps,
    surroundings.second_process,
    surroundings.other_format,
)
"""Those that show each kind of harm once; the others have tests of their parts elsewhere."""
