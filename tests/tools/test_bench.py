"The bench: what it promises to print, and that it fails when it should."

import json

import pytest
import torch

from dsbs.method.training import has_bfloat16
from dsbs.records import TOLERANCE

pytestmark = pytest.mark.numeric

DTYPES = ['float32'] + ['bfloat16'] * has_bfloat16()  # those that are measured when nothing is said
ENGINES = ['stack', 'plain']
TINY = ['--task', 'same_kind', '--student', '0.2M', '--device', 'cpu', '--repeats', '1', '--threads', '1']


@pytest.mark.parametrize('engine', ENGINES)
def test_train_gives_a_row_for_each_implementation_and_dtype(main, engine):
    call = ['bench', 'train', *TINY, '--steps', '1', '--batch-size', '8', '--engine', engine, '--json']
    status, out, _ = main(*call)
    rows = json.loads(out)
    assert status == 0 and [(r['implementation'], r['dtype']) for r in rows] == [
        (w, d) for d in DTYPES for w in ('reference', 'ours')
    ]
    for r in rows:
        assert (
            (r['task'], r['student'], r['batch_size'], r['threads']) == ('same_kind', '0.2M', 8, 1)
            and r['parameters'] > 100_000
            and r['device']
        )
        assert (
            r['tokens_per_second'] > r['examples_per_second'] > 0 and r['peak_gflops'] > 0 and r['peak_memory_mb'] > 0
        )
        assert (
            r['share_of_peak'] == pytest.approx(r['gflops'] / r['peak_gflops'], abs=1e-3)
            and 0 <= r['padding_share'] < 1
        )
        assert r['ratio_to_float32'] == pytest.approx(r['tokens_per_second'] / rows[0]['tokens_per_second'], abs=1e-3)
    assert [r['engine'] for r in rows] == ['trainer', engine] * len(DTYPES)
    for reference, ours in zip(rows[::2], rows[1::2]):
        assert reference['ratio'] == 1 and ours['ratio'] == pytest.approx(
            ours['tokens_per_second'] / reference['tokens_per_second'], abs=1e-3
        )
    for r in rows[1::2]:
        assert r['loss_difference'] <= TOLERANCE[r['dtype']]


def test_the_stack_is_measured_by_default(main):
    status, out, _ = main('bench', 'train', *TINY, '--steps', '1', '--batch-size', '2', '--dtype', 'float32', '--json')
    assert status == 0 and [r['engine'] for r in json.loads(out)] == ['trainer', 'stack']


def test_one_dtype_as_a_table(main):
    status, out, err = main('bench', 'train', *TINY, '--steps', '1', '--batch-size', '2', '--dtype', 'bfloat16')
    where, head, *rows = out.splitlines()
    assert status == 0 and 'left out' not in err and '1 thread, batches of 2, ours: stack' in where and len(rows) == 2
    assert [len(line.split()) for line in rows] == [13, 13] and 'ratio' in head and 'float32' not in ' '.join(rows)


@pytest.mark.parametrize('engine', ENGINES)
def test_evaluate_gives_the_same_answers(main, engine):
    status, out, _ = main('bench', 'evaluate', *TINY, '--limit', '40', '--engine', engine, '--json')
    rows = json.loads(out)
    assert status == 0 and [(r['implementation'], r['dtype']) for r in rows] == [
        (w, d) for d in DTYPES for w in ('reference', 'ours')
    ]
    for r in rows:
        assert (
            r['questions'] == 40
            and r['seconds'] > 0
            and 1 <= r['tokens_written'] <= 64
            and r['peak_memory_mb'] > 0
            and 1 <= r['distinct_answers'] <= 40
        )
    assert rows[0]['same_answers'] == rows[1]['same_answers'] == 1
    assert [r['engine'] for r in rows] == ['trainer', engine] * len(DTYPES)
    for reference, ours in zip(rows[::2], rows[1::2]):
        assert reference['ratio'] == 1 and ours['ratio'] == pytest.approx(
            reference['seconds'] / ours['seconds'], rel=0.01
        )


def test_a_student_with_a_head_of_its_own_takes_the_engine_of_its_runs(main, monkeypatch):
    from dsbs.tools import bench

    monkeypatch.setitem(bench.STUDENTS, '1.1', bench.STUDENTS['0.2M'] | dict(d_model=32))
    monkeypatch.setattr(bench, 'UNTIED', ('1.1',))
    t5 = bench.bench_student('1.1', 300)
    assert 'lm_head.weight' in dict(t5.named_parameters()) and t5.encoder.embed_tokens.weight is t5.shared.weight
    call = [*(word.replace('0.2M', '1.1') for word in TINY), '--dtype', 'float32', '--json']
    status, out, err = main('bench', 'evaluate', *call, '--limit', '8')
    assert status == 0, err
    assert [r['engine'] for r in json.loads(out)] == ['trainer', 'plain']
    status, out, err = main('bench', 'train', *call, '--steps', '1', '--batch-size', '8')
    assert status == 0, err
    assert [r['engine'] for r in json.loads(out)] == ['trainer', 'plain']


@pytest.mark.parametrize('kind', ['train', 'all'])
def test_updates_of_warm_up_do_not_count(main, monkeypatch, kind):
    from dsbs.tools import bench

    monkeypatch.setitem(bench.WARM_UP, 'cpu', 3)
    monkeypatch.setattr(bench, 'VARIANTS', ('ours',))
    monkeypatch.setattr(bench, 'MEASURES', dict(train=bench.train_alone))
    made, speeds = [], bench.speeds
    monkeypatch.setattr(bench, 'speeds', lambda t5, turns, peak: made.append(turns) or speeds(t5, turns, peak))
    call = [*TINY, '--repeats', '2', '--steps', '2', '--batch-size', '8', '--dtype', 'float32', '--json']
    status, out, err = main('bench', kind, *call)
    assert status == 0, err
    assert len(made) == dict(train=2, all=1)[kind]
    assert all([len(turn.batches) for turn in turns] == [2, 2] for turns in made)


@pytest.mark.parametrize('engine', ENGINES)
def test_answers_that_differ_and_do_not_end_are_the_same(engine):
    from dsbs.tools.bench import BenchSettings, bench_evaluate

    settings = BenchSettings('cpu', ('float32',), repeats=1, threads=1, engine=engine, limit=64, updates=1)
    reference, ours = bench_evaluate('same_kind', '0.2M', settings)
    assert (
        reference['tokens_written'] > ours['tokens_written']
        and ours['distinct_answers'] > 1
        and ours['same_answers'] == 1
    )


@pytest.mark.parametrize('engine', ENGINES)
@pytest.mark.parametrize('wrong, words', [(1.001, 'loss is'), (float('nan'), 'loss is nan')])
def test_another_loss_fails_the_bench(main, monkeypatch, engine, wrong, words):
    from dsbs.tools.bench import BENCH_ENGINES

    class Wrong(BENCH_ENGINES[engine]):
        def forward(self, *args):
            return {name: wrong * value for name, value in super().forward(*args).items()}

    monkeypatch.setitem(BENCH_ENGINES, engine, Wrong)
    status, out, err = main('bench', 'train', *TINY, '--engine', engine, '--json')
    assert (
        status == 1 and not out and words in err.splitlines()[-1] and err.splitlines()[-1].startswith('dsbs: Unequal: ')
    )


@pytest.mark.parametrize('engine', ENGINES)
def test_another_gradient_fails_the_bench(main, monkeypatch, engine):
    from dsbs.method.settings import loss_scale
    from dsbs.tools.bench import BENCH_ENGINES

    class Wrong(BENCH_ENGINES[engine]):  # the losses are right, and the rationale teaches nothing
        def forward(self, *args):
            out = super().forward(*args)
            label = loss_scale('authors', 1.0) * out['label_loss']
            return out | dict(loss=out['loss'].detach() + label - label.detach())

    monkeypatch.setitem(BENCH_ENGINES, engine, Wrong)
    status, out, err = main('bench', 'train', *TINY, '--engine', engine)
    assert status == 1 and not out and 'gradient norm is' in err.splitlines()[-1]


@pytest.mark.parametrize('engine', ENGINES)
def test_other_answers_fail_the_bench(main, monkeypatch, engine):
    import dsbs.tools.bench

    monkeypatch.setattr(
        dsbs.tools.bench,
        'generate',
        lambda t5, tokenizer, batches, longest, **_: ['maybe'] * sum(len(b.places) for b in batches),
    )
    status, out, err = main('bench', 'evaluate', *TINY, '--limit', '5', '--engine', engine)
    assert status == 1 and not out and "5 of 5 answers are not the same in float32: 'maybe'" in err.splitlines()[-1]


def test_a_tie_may_go_either_way():
    from dsbs.tools.bench import bench_student, nearest_choice

    t5 = bench_student('0.2M', 50)
    apart = nearest_choice(t5, [5, 6, 1], [7, 1])
    with torch.no_grad():
        t5.shared.weight[3:] = t5.shared.weight[3]
    assert apart > nearest_choice(t5, [5, 6, 1], [7, 1]) == 0


@pytest.mark.parametrize(
    'call, words',
    [
        (['train', '--task', 'sudoku'], ["unknown task of the bench 'sudoku'", 'same_kind, svamp, cqa, esnli']),
        (['train', '--student', '9B'], ["unknown student '9B'", '0.2M, 9M, 60M, 77M, 220M, 770M']),
        (['train', '--dtype', 'float16'], ["unknown dtype 'float16'", 'bfloat16']),
        (['train', '--device', 'tpu'], ["unknown device 'tpu'", 'cpu, cuda']),
        (['train', '--engine', 'steam'], ["unknown engine 'steam'", 'stack, plain']),
        (['train', '--repeats', '0'], ['repeats=0', 'at least 1']),
        (['train', '--steps', '0'], ['steps=0']),
        (['train', '--batch-size', '-1'], ['not a whole number']),
        (['train', '--limit', '5'], ['--limit']),
        (['evaluate', '--limit', '0'], ['--limit 0', 'at least 1']),
        (['evaluate', '--steps', '5'], ['--steps']),
        (['train', '--task', 'cqa', '--data-dir', 'nowhere'], ['cqa_train.json is missing']),
        (['guess'], ["'guess'", 'train', 'evaluate']),
        ([], ['measure']),
    ],
    ids=lambda x: ' '.join(x) if isinstance(x, list) else '',
)
def test_a_wrong_call_gets_one_line(main, call, words):
    status, out, err = main('bench', *call)
    assert status == 2 and not out and err.count('\n') == 1, (status, out, err)
    for word in words:
        assert word in err


def test_cuda_asked_for_where_there_is_none(main, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    status, out, err = main('bench', 'evaluate', '--device', 'cuda')
    assert (status, out, err.count('\n')) == (2, '', 1) and 'no CUDA device' in err


def test_what_is_measured_when_nothing_is_said(recorded):
    from dsbs.tools.bench import bench_cases

    assert bench_cases(device='cpu') == [('same_kind', '0.2M'), ('cqa', '9M'), ('svamp', '9M')]
    assert bench_cases(device='cuda') == [('cqa', '220M'), ('svamp', '220M')]
    assert bench_cases(device='cuda', folders='nowhere') == [('same_kind', '220M')]


# ---- a device without bfloat16, and a signal


@pytest.fixture
def without_bfloat16(monkeypatch):
    monkeypatch.setattr('dsbs.tools.bench.has_bfloat16', lambda device: False)


def test_bfloat16_is_left_out_where_the_device_has_none(main, without_bfloat16):
    status, out, err = main('bench', 'train', *TINY, '--steps', '1', '--batch-size', '8', '--json')
    assert status == 0 and {r['dtype'] for r in json.loads(out)} == {'float32'}
    assert [
        line for line in err.splitlines() if line.startswith('dsbs: bfloat16 is left out: ')
    ] and '--dtype bfloat16' in err


def test_the_slowest_products_take_little_time(without_bfloat16, monkeypatch):
    "A device that multiplies a hundred times as slowly is asked for smaller matrices."
    from dsbs.tools import bench

    asked = []
    monkeypatch.setattr(bench, 'product_seconds', lambda n, dtype, device='cpu': asked.append(n) or 2 * n**3 / 4e8)
    assert bench.matmul_peak('bfloat16') == pytest.approx(0.4) and max(asked) <= 256


@pytest.mark.parametrize('measure', ['train', 'evaluate'])
def test_stopped_by_a_signal_it_prints_what_is_finished(main, monkeypatch, measure):
    from dsbs.tools import bench

    whole, asked = getattr(bench, f'{measure}_rows'), []

    def rows(*args):
        asked.append(args)
        if len(asked) == 2:
            raise KeyboardInterrupt  # as SIGINT and SIGTERM do
        return whole(*args)

    monkeypatch.setattr(bench, f'{measure}_rows', rows)
    status, out, err = main('bench', measure, *TINY, '--dtype', 'float32', '--dtype', 'bfloat16', '--json')
    assert status == 1 and [(r['implementation'], r['dtype']) for r in json.loads(out)] == [
        ('reference', 'float32'),
        ('ours', 'float32'),
    ]
    assert err.splitlines()[-1] == 'dsbs: stopped: these 2 of 4 rows are finished'


def test_stopped_before_anything_is_finished(main, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr('dsbs.tools.bench.train_rows', stop)
    status, out, err = main('bench', 'train', *TINY, '--json')
    assert (status, out) == (1, '') and 'stopped' in err.splitlines()[-1]


def test_numbers_have_digits_however_slow():
    "Half a token in a second has as many digits as a million."
    from dsbs.tools import bench

    assert [bench.six_digits(x) for x in (0.123456789, 1234567.8)] == [0.123457, 1234570.0]


def test_bfloat16_where_it_is_imitated_is_said_once(monkeypatch, capsys):
    from dsbs.method import training
    from dsbs.method.multitask import Tokenised
    from dsbs.method.settings import TrainingConfig
    from dsbs.method.student import make_student

    monkeypatch.setenv('ONEDNN_MAX_CPU_ISA', 'AVX2')
    training.warn_of_bfloat16.cache_clear()
    rows, config = (
        [Tokenised([4, 5, 1], [6, 1], [], [])] * 2,
        TrainingConfig(max_steps=1, batch_size=2, eval_every=1, dtype='bfloat16'),
    )
    for _ in range(2):
        training.fit(
            training.PlainEngine([make_student('scratch-16x2', ['a b c d e f'] * 3)[0]]),
            [training.Trainee(rows, lambda: 0.0)],
            config,
        )
    training.warn_of_bfloat16.cache_clear()
    said = capsys.readouterr().err
    assert said.count('only imitates bfloat16') == 1 and 'times as long as in float32; use dtype=float32' in said


# ---- the whole table


@pytest.fixture
def no_compiler(monkeypatch):
    def compile(module, **_):
        raise RuntimeError('no C++ compiler\nis here')

    monkeypatch.setattr(torch.nn.Module, 'compile', compile)


ALL = ['--student', '0.2M', '--task', 'same_kind', '--repeats', '2', '--threads', '1', '--steps', '1', '--limit', '9']


def test_the_whole_table_has_a_row_for_each_and_says_what_could_not_be(main, no_compiler):
    status, out, err = main('bench', '--all', *ALL, '--batch-size', '8', '--device', 'cpu', '--json')
    rows = json.loads(out)
    assert status == 0 and [(r['measure'], r['implementation'], r['failed']) for r in rows] == [
        (measure, variant, why)
        for measure in ('train', 'answer')
        for variant, why in (('ours', ''), ('compiled', 'RuntimeError: no C++ compiler'))
    ]
    train, _, answer, _ = rows
    for r in rows:
        assert r['torch'] == torch.__version__ and r['finished'] and r['device'] and not r['tf32'] and r['commit']
        assert r['dtype'] == DTYPES[-1] and r['student'] == '0.2M' and r['parameters'] == 213568 or r['failed']
    assert 0 < train['share_of_peak'] < 1 and train['peak_memory_mb'] > 50 and train['accumulation'] == 1
    assert train['tokens_per_second'] > train['examples_per_second'] > 0 and train['ratio'] == answer['ratio'] == 1
    assert answer['questions'] == 9 and answer['tokens_written'] == 3 and answer['tokens_per_second'] > 0


def test_the_whole_table_as_text(main, no_compiler):
    status, out, _ = main('bench', '--all', *ALL, '--batch-size', '8', '--device', 'cpu')
    where, head, *rows = out.splitlines()
    assert status == 0 and f'torch {torch.__version__}, same_kind in {DTYPES[-1]}, ' in where
    assert 'share of peak' in head and len(rows) == 4 and sum('no C++ compiler' in row for row in rows) == 2


def test_what_does_not_fit_is_measured_in_pieces_or_says_so(monkeypatch):
    from dsbs.method.training import PlainEngine
    from dsbs.tools import bench

    forward, most = PlainEngine.forward, [4]

    def narrowed(engine, batch, totals=None):
        if len(batch.label_targets) > most[0]:
            raise torch.OutOfMemoryError('CUDA out of memory.')
        return forward(engine, batch, totals)

    monkeypatch.setattr(PlainEngine, 'forward', narrowed)
    monkeypatch.setattr(bench, 'VARIANTS', ('ours',))
    how = dict(batch_size=16, repeats=1, steps=1, threads=1, engine='plain', limit=5)
    settings = bench.BenchSettings('cpu', ('float32',), **how)
    train, answer = bench.bench_all('same_kind', '0.2M', settings)
    assert (train['accumulation'], train['failed'], answer['failed']) == (4, '', '')
    most[0] = 0
    train, answer = bench.bench_all('same_kind', '0.2M', settings)
    assert train['failed'] == ('OutOfMemory: out of memory with one example at a time: set gradient_checkpointing=true')
    assert train['ratio'] is None and answer['examples_per_second'] > 0


def test_when_nothing_could_be_measured_the_call_failed(main, monkeypatch):
    from dsbs.tools import bench

    monkeypatch.setattr(bench, 'variant_of', lambda *_: 1 / 0)
    status, out, err = main('bench', '--all', *ALL, '--device', 'cpu', '--json')
    assert status == 1 and len(json.loads(out)) == 4
    assert err.splitlines()[-1] == 'dsbs: nothing could be measured: ZeroDivisionError: division by zero'


@pytest.mark.slow
def test_a_student_is_compiled(main):
    status, out, err = main(
        'bench', '--all', *ALL, '--batch-size', '8', '--device', 'cpu', '--dtype', 'float32', '--json'
    )
    rows = json.loads(out)
    assert status == 0 and {r['failed'] for r in rows} == {''} and len(rows) == 4
