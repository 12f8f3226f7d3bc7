"Rows that stand in for absent training rows: whose they are, and what is asked for when they are not there."

import json
from pathlib import Path

import pytest

from dsbs.data.paper import premise
from dsbs.data.tasks import load_task
from dsbs.records import UsageError


def write_pairs(path, premises):
    "Three pairs for each premise, as the authors' files have them."
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [dict(premise=f'Man {i} eats.', hypothesis=f'He is {j}.', label=j) for i in premises for j in range(3)]
    path.write_text('\n'.join(map(json.dumps, rows)))


def premises(rows):
    return {premise(row) for row in rows}


def test_the_stand_in_of_esnli_is_tested_on_its_own_test_rows(tmp_path):
    write_pairs(tmp_path / 'esnli' / 'esnli_valid.json', range(40))
    write_pairs(tmp_path / 'esnli' / 'esnli_test.json', range(35, 50))
    task = load_task('esnli', tmp_path, stand_in=True)
    whole = load_task('esnli', tmp_path)
    assert task['test'].to_list() == whole['test'].to_list() and len(task['test']) == 3 * 15
    trained, validated = premises(task['train']), premises(task['validation'])
    assert len(trained | validated) == 35 and not trained & validated
    assert not (trained | validated) & premises(task['test'])
    assert task.sources == dict(train='validation', validation='validation', test='test')
    assert task.note.startswith(f'{len(task["train"])} validation rows stand in') and '45 test rows' in task.note


def test_the_stand_in_of_anli_has_validation_rows_alone(tmp_path):
    write_pairs(tmp_path / 'anli1' / 'anli1_valid.json', range(40))
    task = load_task('anli1', tmp_path, stand_in=True)
    parts = [premises(task[s]) for s in task.splits]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 40 and all(parts)
    assert sum(len(task[s]) for s in task.splits) == 3 * 40 and set(task.sources.values()) == {'validation'}


def test_test_rows_that_are_not_there_are_asked_for(tmp_path, main):
    write_pairs(tmp_path / 'esnli' / 'esnli_valid.json', range(40))
    with pytest.raises(UsageError, match='esnli_test.json is missing in .*dsbs data fetch esnli') as refused:
        load_task('esnli', tmp_path, stand_in=True)
    assert 'stand_in' not in str(refused.value)
    status, out, err = main('run', 'task=esnli', 'stand_in=true', '--data-dir', tmp_path)
    assert (status, out, err.count('\n')) == (2, '', 1) and 'esnli_test.json is missing' in err


def test_the_recorded_stand_in_keeps_every_test_row(recorded):
    if not (Path(recorded) / 'esnli' / 'esnli_test.json').is_file():
        pytest.skip('needs the test rows of e-SNLI')
    task = load_task('esnli', recorded, stand_in=True)
    assert len(task['test']) == 9_824 and not premises(task['test']) & premises(task['train'])
