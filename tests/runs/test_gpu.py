"What a GPU makes, beside what a CPU makes; skipped where there is none. Every other test computes on the CPUs."

import json
import subprocess
import sys

import pytest
from conftest import CARDS
from small_t5 import small_t5, weights

from dsbs.runs.experiments import visible_cards

TINY = ['student=scratch-32x1', 'n_train=64', 'max_steps=40', 'eval_every=20', 'batch_size=16', 'dropout=0']


@pytest.fixture
def card(monkeypatch):
    "Lets commands see the GPU that the tester lets tests see."
    if CARDS == 'all':
        monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    else:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', CARDS)
    if not visible_cards():
        pytest.skip('needs a GPU')


def made(dsbs, runs, *settings):
    status, out, err = dsbs('run', *settings, '--json', runs=runs)
    assert status == 0, err
    return json.loads(out)


@pytest.mark.parametrize('method', ['standard', 'step_by_step', 'answer_first', 'rationale_as_input'])
def test_a_small_student_learns_the_same_on_both(card, dsbs, tmp_path, monkeypatch, method):
    there = made(dsbs, tmp_path / 'gpu', *TINY, f'method={method}')
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    here = made(dsbs, tmp_path / 'cpu', *TINY, f'method={method}')
    assert there['provenance']['device_name'] != 'cpu' == here['provenance']['device_name']
    losses = [[row['loss'] for row in record['history'][:20]] for record in (there, here)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


BEGIN = """
import itertools, sys
from dsbs.method.training import Interrupted
from dsbs.runs.run import train_runs
from dsbs.runs.specs import make_spec, prepare
updates, spec = itertools.count(1), make_spec(dict(word.split('=', 1) for word in sys.argv[1:]))
try:
    train_runs([prepare(spec)], resume=True, stop=lambda: next(updates) == 6, save_every=0)
except Interrupted:
    print('stopped')
"""


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_student_with_a_head_of_its_own_is_stopped_and_goes_on(card, dsbs, tmp_path, monkeypatch, dtype):
    "T5 v1.1 has one."
    folder = small_t5(tmp_path / 't5')
    weights(folder, lambda found: found.update({'lm_head.weight': found['shared.weight'] + 0.1}))
    settings = [f'student={folder}', 'n_train=64', 'max_steps=12', 'eval_every=6', 'batch_size=16', f'dtype={dtype}']
    whole = made(dsbs, tmp_path / 'whole', *settings)
    monkeypatch.setenv('DSBS_RUNS', str(tmp_path / 'parts'))
    begun = subprocess.run([sys.executable, '-c', BEGIN, *settings], capture_output=True, text=True)
    assert begun.stdout == 'stopped\n', begun.stderr
    rest = made(dsbs, tmp_path / 'parts', *settings)
    assert [(r['step'], r['why']) for r in rest['provenance']['resumed']] == [(6, 'sums on a GPU are not repeatable')]
    assert rest['history'][-1]['loss'] == pytest.approx(whole['history'][-1]['loss'], rel=0.02)


@pytest.mark.parametrize('kind', ['train', 'evaluate', pytest.param('all', marks=pytest.mark.slow)])  # It compiles
def test_bench_measures_it(card, dsbs, kind):
    few = ['--repeats', '1', '--steps', '1', '--batch-size', '8'][: 2 if kind == 'evaluate' else 6]
    status, out, err = dsbs('bench', kind, '--task', 'same_kind', '--student', '77M', '--json', *few)
    assert status == 0, err
    rows = json.loads(out)
    assert not [r['failed'] for r in rows if r.get('failed')]
    assert {r['engine'] for r in rows if r['implementation'] != 'reference'} == {'plain'}
