"The command as a shell sees it: bad calls, stopping and going on, and the paper's data."

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from nearly import nearly_the_same
from waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
TINY = ['student=scratch-32x1', 'max_steps=20', 'eval_every=10', 'learning_rate=3e-3', 'batch_size=8', 'n_train=64']


def one_line(result, *words):
    status, out, err = result
    lines = [line for line in err.splitlines() if line.strip()]
    assert status == 2 and not out and len(lines) == 1, result
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.parametrize(
    'call, words',
    [
        (['run', 'task=sudoku'], ["unknown task 'sudoku'", 'same_kind']),
        (['run', 'method=magic'], ["unknown method 'magic'", 'step_by_step']),
        (['run', 'metod=standard'], ['did you mean method?']),
        (['run', 'n_train=99999'], ['n_train=99999', '720 rows']),
        (['run', 'n_train=5', 'train_fraction=0.5'], ['not both']),
        (['run', 'train_fraction=2'], ['train_fraction=2.0']),
        (['run', 'learning_rate=fast'], ['should be a number']),
        (['run', 'learning_rate=nan'], ['learning_rate']),
        (['run', 'task=same_kind', 'task=heavier_than'], ['given twice']),
        (['run', 'student=bert'], ["unknown student 'bert'"]),
        (['run', 'student=./nbs'], ['no config.json']),
        (['run', 'stand_in=true'], ['stand_in=true works for']),
        (['run', 'task=cqa', '--data-dir', 'nowhere'], ['cqa_train.json is missing']),
        (['run', 'task=esnli', '--data-dir', 'nowhere'], ['esnli_train.json is missing', 'stand_in=true']),
        (['teacher', 'cqa', '--split', 'dev'], ["unknown split 'dev'"]),
        (['reproduce', 'fig99'], ["unknown figure 'fig99'"]),
        (['reproduce', '--preset', 'fast'], ["unknown preset 'fast'"]),
        (['reproduce', '--preset', 'papers'], ["unknown preset 'papers'"]),
        (['reproduce', '--workers', '-1'], ['not a whole number']),
        (['fly'], ["'fly'"]),
        ([], ['command']),
    ],
    ids=lambda x: ' '.join(x) if isinstance(x, list) else '',
)
def test_a_wrong_call_gets_one_line(main, tmp_path, call, words):
    one_line(main(*call), *words)
    assert not (tmp_path / 'runs').exists() or not list((tmp_path / 'runs').rglob('*.json'))


@pytest.mark.parametrize(
    'content, words',
    [
        (b'', ['no rows']),
        (b'{"input": "a"', [':1: not JSON']),
        (b'[1]', [':1: expected an object']),
        (b'\xff\xfe', ['not UTF-8']),
        (b'{"input": "a and b?", "label": "( 1 )"}\n{"input": "c?"}', [":2: no field 'label'"]),
        (b'{"input": " ", "label": "1"}', ["'input' is empty"]),
    ],
)
def test_a_broken_data_file_gets_one_line(main, tmp_path, content, words):
    folder = tmp_path / 'data' / 'svamp'
    folder.mkdir(parents=True)
    (folder / 'svamp_train.json').write_bytes(content)
    one_line(main('run', 'task=svamp', '--data-dir', tmp_path / 'data'), 'svamp_train.json', *words)


def test_a_wrong_call_is_the_same_from_a_shell(dsbs):
    one_line(dsbs('run', 'task=sudoku'), "unknown task 'sudoku'")


@pytest.mark.parametrize('call, words', [(['status'], '0 done'), (['--help'], 'reproduce')])
def test_what_is_asked_often_loads_nothing_heavy(tmp_path, call, words):
    "It should answer at once: no library that takes a good part of a second to load."
    code = f"""import sys
from dsbs.tools.cli import main
try: status = main({call})
except SystemExit as e: status = e.code
heavy = {{'torch', 'transformers', 'datasets', 'numpy', 'pandas'}} & set(sys.modules)
sys.exit(status or str(heavy or '') or 0)"""
    done = subprocess.run(
        [sys.executable, '-c', code],
        env=os.environ | {'DSBS_RUNS': str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 and words in done.stdout, done.stderr


@pytest.mark.parametrize('call', [['export', 'a student', '--to', 'ctranslate2'], ['run', 'task=same_kind', '--save']])
def test_a_place_that_is_taken_is_named_before_torch_is_loaded(main, tmp_path, monkeypatch, call):
    (tmp_path / 'taken').mkdir()
    (tmp_path / 'taken' / 'mine.txt').write_text('mine')
    for name in ('torch', 'dsbs.tools.serving', 'dsbs.runs.saved', 'dsbs.runs.experiments'):
        monkeypatch.setitem(sys.modules, name, None)  # an import fails
    one_line(main(*call, tmp_path / 'taken'), 'there is something already; name a new folder')


def test_run_prints_its_record_and_is_not_made_twice(dsbs):
    status, out, err = dsbs('run', *TINY, '--json')
    record = json.loads(out)
    assert 'step 10 of 20 (50%)' in err and 'step 20 of 20 (100%)' in err
    assert status == 0 and {'key', 'spec', 'metrics', 'history', 'provenance'} <= set(record)
    assert len(record['history']) == 20 and record['history'][-1]['loss'] < record['history'][0]['loss']
    assert json.loads(dsbs('run', *TINY, '--json')[1]) == record


def test_same_spec_same_record(dsbs, tmp_path):
    from dsbs.runs.verifying import same_numbers

    first, second = (json.loads(dsbs('run', *TINY, '--json', runs=tmp_path / name)[1]) for name in 'ab')
    assert same_numbers(first) == same_numbers(second)


def test_figures_by_preset_recorded_are_the_published_ones(dsbs, tmp_path, published):
    here = published / 'reports'
    if not list((here / 'results').glob('*.jsonl')):
        pytest.skip('no published results yet')
    reports = tmp_path / 'reports'
    shutil.copytree(here / 'results', reports / 'results')
    for name in ('datasets.jsonl', 'independent_runs.csv'):  # the opening figure has a row of other people's runs
        shutil.copy(here / name, reports)
    status, out, err = dsbs('reproduce', 'fig4', '--preset', 'recorded', '--reports', reports, '--json')
    assert 'Kernel' not in err
    assert status == 0, err
    drawn = list((reports / 'figures').glob('*.svg'))
    assert {'headline.svg', 'fig4_data_size_human_independent.svg'} <= {svg.name for svg in drawn}
    for svg in drawn:
        assert svg.read_bytes() == (here / 'figures' / svg.name).read_bytes()


def test_smoke_leaves_good_figures_alone(dsbs, tmp_path):
    reports = tmp_path / 'reports'
    (reports / 'figures').mkdir(parents=True)
    (reports / 'figures' / 'fig4_data_size_human_embedded.png').write_bytes(b'good')
    status, out, err = dsbs('reproduce', 'fig4', '--preset', 'smoke', '--reports', reports, '--json')
    assert status == 0, err
    written = [Path(p) for p in json.loads(out)['written']]
    assert {p.suffix for p in written} == {'.png', '.svg', '.jsonl', '.ipynb'} and all(
        p.is_relative_to(reports / 'smoke') for p in written
    )
    assert (reports / 'figures' / 'fig4_data_size_human_embedded.png').read_bytes() == b'good'
    assert not list(reports.glob('.staging-*'))


def is_there(group):
    "Whether a process group has any process left."
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_killed_grid_goes_on_where_it_stopped(dsbs, tmp_path):
    "SIGKILL in the middle: what was recorded is not made again, and the results are those of an undisturbed run."
    from dsbs.runs.verifying import same_numbers

    env = os.environ | {'DSBS_RUNS': str(tmp_path / 'runs')}
    command = [
        str(Path(sys.executable).parent / 'dsbs'),
        'reproduce',
        'fig4',
        '--preset',
        'smoke',
        '--workers',
        '1',
        '--reports',
        str(tmp_path / 'reports'),
    ]
    started = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL, process_group=0)
    records = lambda: {p: p.stat().st_mtime_ns for p in (tmp_path / 'runs').glob('*/record.json')}
    wait_for(lambda: len(records()) >= 3)
    started.send_signal(signal.SIGKILL)
    started.wait()
    wait_for(lambda: not is_there(started.pid))  # workers must end with the command
    before = records()
    assert 3 <= len(before) < 20
    assert not list((tmp_path / 'reports').rglob('*.png'))
    assert dsbs('reproduce', 'fig4', '--preset', 'smoke', '--reports', tmp_path / 'reports')[0] == 0
    assert not list((tmp_path / 'reports').glob('.staging-*'))
    after = records()
    assert len(after) > len(before) and all(after[p] == t for p, t in before.items())
    kept = list(after)[0]
    record = json.loads(kept.read_text())
    spec = [f'{k}={v}' for k, v in record['spec'].items() if v is not None and v != '']
    again = json.loads(dsbs('run', *spec, '--json', runs=tmp_path / 'fresh')[1])
    alone = record['provenance']['students'] == 1
    assert same_numbers(again) == same_numbers(record) if alone else nearly_the_same(again, record)


@pytest.mark.parametrize(
    'task, split, accuracy',
    [
        ('cqa', 'test', 77.23),
        ('cqa', 'train', 74.26),
        ('svamp', 'test', 74.00),
        ('svamp', 'train', 73.50),
        ('anli1', 'validation', 66.80),
        ('esnli', 'validation', 73.17),
    ],
)
def test_recorded_teacher(main, recorded, task, split, accuracy):
    status, out, err = main('teacher', task, '--split', split, '--json', '--data-dir', recorded)
    result = json.loads(out)
    assert (
        status == 0
        and result['accuracy'] == accuracy
        and {'task', 'split', 'teacher', 'n', 'correct', 'unreadable'} <= set(result)
    )


@pytest.mark.parametrize(
    'settings',
    [
        ['task=cqa'],
        ['task=svamp'],
        ['task=esnli', 'stand_in=true'],
        ['task=anli1', 'stand_in=true', 'label_source=teacher'],
        ['task=svamp', 'method=single_task', 'max_target=128'],
        ['task=svamp', 'method=answer_first'],
        ['task=cqa', 'method=rationale_as_input'],
        ['task=svamp', 'prefix_style=authors', 'loss_form=authors'],
    ],
    ids=' '.join,
)
def test_paper_data_trains(main, recorded, settings):
    status, out, err = main(
        'run',
        *settings,
        'student=scratch-32x1',
        'max_steps=50',
        'eval_every=50',
        'n_train=256',
        'batch_size=16',
        'learning_rate=3e-3',
        '--json',
        '--data-dir',
        recorded,
    )
    assert status == 0, err
    record = json.loads(out)
    assert record['history'][-1]['loss'] < record['history'][0]['loss']
    assert bool(record['stand_in']) == ('stand_in=true' in settings)
