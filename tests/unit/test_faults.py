"""The faults of the mutation proof fit the code, so that the proof can run at any time."""

from dataclasses import replace

from tests.prove.mutations import FAULTS, ROOT, check_faults


def test_the_text_that_every_fault_replaces_occurs_once() -> None:
    assert check_faults(FAULTS) == []


def test_a_fault_of_code_that_is_gone_is_reported() -> None:
    [line] = check_faults([replace(FAULTS[0], old="no such text\n")])
    assert line.startswith(f"{FAULTS[0].id}: ")


def test_the_test_file_of_every_fault_exists() -> None:
    assert [fault.id for fault in FAULTS if not (ROOT / fault.tests[0]).is_file()] == []
