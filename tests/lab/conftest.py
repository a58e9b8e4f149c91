"""The small run folder of the tests of evaluation."""

from tests.evaluation.conftest import make_run  # noqa: F401
