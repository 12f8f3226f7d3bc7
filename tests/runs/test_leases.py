"Several launchers on one folder of runs: nothing made twice, nothing lost, and an end when one is asked for."

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
from waiting import HANGS, wait_for

from dsbs.records import find_folders
from dsbs.runs import experiments, leases
from dsbs.runs.experiments import POLL, run, run_all, run_status
from dsbs.runs.leases import BEAT, STALE, lease_holder, take_lease
from dsbs.runs.specs import RunSpec, run_key

ROOT = Path(__file__).resolve().parents[2]
TINY = RunSpec(
    student='scratch-32x1', dropout=0.0, n_train=40, max_steps=4, eval_every=2, batch_size=8, learning_rate=1e-3
)
GRID = [replace(TINY, n_train=n, seed=s, subset_seed=s) for n in (20, 30, 40) for s in range(3)]
FORK = get_context('fork')

needs_proc = pytest.mark.skipif(not leases._where(), reason='this system does not tell when a process began')


def note(folder, what, key):
    "One line in a file that all processes write to."
    line = json.dumps(dict(what=what, key=key, pid=os.getpid(), group=os.getpgrp(), time=time.time())) + '\n'
    fd = os.open(folder / 'log', os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(fd, line.encode())
    finally:
        os.close(fd)


def notes(folder, what=None):
    lines = (
        [json.loads(line) for line in (folder / 'log').read_text().splitlines()] if (folder / 'log').exists() else []
    )
    return [line for line in lines if what in (None, line['what'])]


def stand_in(folder, seconds=(0.02, 0.05), heeds=True):
    "A trainer that only sleeps, and says when it begins and when its record is in place."

    def train(prepared, progress, done, stop):
        for p in prepared:
            note(folder, 'start', p.key)
        end = time.monotonic() + random.uniform(*seconds) * len(prepared)
        while time.monotonic() < end:
            time.sleep(0.005)
            if stop() and heeds:
                raise experiments.Stopped
        for p in prepared:
            done(dict(key=p.key, by=os.getpid(), time=dict(seconds=0.1)))
            note(folder, 'end', p.key)

    return train


@pytest.fixture
def quick(monkeypatch):
    "Workers that are forked, since nothing is loaded in them, and shorter waits."
    monkeypatch.setattr(experiments, '_context', lambda: FORK)
    monkeypatch.setattr(experiments, 'POLL', 0.03)
    for s in GRID:
        run_key(s)
    return monkeypatch


def launcher(folder, work=lambda folder: run_all(GRID, find_folders(runs=folder), workers=2), before=lambda: None):
    "A process, in a group of its own, that works on a folder; what it raised is in the file outcome."

    def go():
        os.setpgid(0, 0)
        before()
        try:
            work(folder)
            said = ''
        except BaseException as e:
            said = f'{type(e).__name__}: {e}'
        (folder / f'outcome.{os.getpid()}').write_text(said)
        os._exit(0)

    process = FORK.Process(target=go)
    process.start()
    return process


def outcome(process, folder):
    process.join(HANGS)
    assert process.exitcode == 0
    return (folder / f'outcome.{process.pid}').read_text()


def kill_all(process, number=signal.SIGKILL):
    "Once it is in its group, or has ended."
    wait_for(lambda: not process.is_alive() or os.getpgid(process.pid) == process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def under_way(folder, process):
    "Keys of runs that a launcher's workers have begun and not ended."
    own = {
        what: [line['key'] for line in notes(folder, what) if line['group'] == process.pid] for what in ('start', 'end')
    }
    return set(own['start']) - set(own['end'])


def one_round(folder, rng):
    "Two launchers, one killed with its workers at a moment at which it has runs under way: how many were taken over."
    folder.mkdir()
    pair = [launcher(folder) for _ in range(2)]
    killed = rng.choice(pair)
    other = pair[1 - pair.index(killed)]
    wait_for(lambda: under_way(folder, killed) or all(p.exitcode is not None for p in pair))
    time.sleep(rng.uniform(0, 0.03))
    kill_all(killed)
    killed.join()
    assert outcome(other, folder) == ''
    assert {p.parent.name for p in folder.glob('*/record.json')} == {run_key(s) for s in GRID}, 'lost'
    assert not list(folder.glob('*/lease.*')) and not list(folder.glob('*/error.txt'))
    taken_over = 0
    for s in GRID:
        ends, starts = (
            [line for line in notes(folder, what) if line['key'] == run_key(s)] for what in ('end', 'start')
        )
        assert len(ends) <= 1 and 1 <= len(starts) <= 2, 'trained twice'
        if len(starts) == 2:
            assert (starts[0]['group'], starts[1]['group']) == (killed.pid, other.pid) and not any(
                e['pid'] == starts[0]['pid'] for e in ends
            )
            taken_over += 1
    return taken_over


@needs_proc
@pytest.mark.parametrize('rounds', [8, pytest.param(50, marks=pytest.mark.slow)])
def test_two_launchers_one_of_them_killed(tmp_path, quick, rounds):
    """No run is trained twice to the end, none is lost, and a dead launcher's runs are taken over: here, where its
    processes can be asked for, before its leases are stale."""
    quick.setattr(leases, 'STALE', 10 * HANGS)
    rng, taken_over = random.Random(rounds), 0
    for i in range(rounds):
        folder = tmp_path / str(i)
        quick.setattr(experiments, '_train', stand_in(folder))
        taken_over += one_round(folder, rng)
    assert taken_over >= rounds / 4


@needs_proc
@pytest.mark.parametrize('where, step', [(leases, 'canonical_json'), (os, 'link')], ids=['before', 'written'])
def test_a_process_killed_while_it_takes_a_lease_holds_nothing(tmp_path, monkeypatch, where, step):
    "Before its file is written, and before it has its name: a lease cut short would be held until it is stale."
    monkeypatch.setattr(where, step, lambda *args, **kw: os._exit(9))
    process = FORK.Process(target=take_lease, args=(tmp_path,))
    process.start()
    process.join(HANGS)
    monkeypatch.undo()
    assert process.exitcode == 9 and lease_holder(tmp_path) is None
    lease = take_lease(tmp_path)
    lease.release(done=True)
    assert lease and not list(tmp_path.iterdir())


def test_where_there_are_no_hard_links_one_process_gets_a_lease(tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError(errno.EPERM, 'not permitted')

    monkeypatch.setattr(os, 'link', no_links)
    lease = take_lease(tmp_path)
    assert lease and take_lease(tmp_path) is None and lease_holder(tmp_path)['pid'] == os.getpid()
    lease.release(done=True)
    assert not list(tmp_path.iterdir())


def test_a_launcher_of_another_machine_dies(tmp_path, quick):
    "Whether its processes live cannot be asked, so its leases go stale: after a second here, after 30 for good."
    stale = 1.0
    quick.setattr(leases, 'STALE', stale)
    quick.setattr(leases, 'BEAT', 0.05)
    quick.setattr(experiments, '_train', stand_in(tmp_path, (HANGS, HANGS)))
    far = launcher(tmp_path, before=lambda: setattr(leases, '_where', lambda: 'another machine'))
    wait_for(lambda: under_way(tmp_path, far))
    kill_all(far)
    far.join()
    begun = {line['key'] for line in notes(tmp_path, 'start')}
    beats = {key: max(p.stat().st_mtime for p in (tmp_path / key).glob('lease.*.json')) for key in begun}
    quick.setattr(experiments, '_train', stand_in(tmp_path))
    assert outcome(launcher(tmp_path), tmp_path) == ''
    assert {p.parent.name for p in tmp_path.glob('*/record.json')} == {run_key(s) for s in GRID}
    again = {
        line['key']: line['time']
        for line in notes(tmp_path, 'start')
        if line['group'] != far.pid and line['key'] in begun
    }
    assert again.keys() == begun and all(again[key] >= beats[key] + stale - 0.1 for key in begun), (
        'taken over while it could have been alive'
    )
    assert STALE >= 5 * BEAT and STALE + 2 * POLL + BEAT < 60


def test_a_lease_is_kept_alive_by_its_holder(tmp_path):
    "Each sign of life is younger than the last; an old one that is not followed by another is none."
    lease = take_lease(tmp_path, beat=0.02)
    beats = set()
    wait_for(lambda: beats.add(lease.path.stat().st_mtime_ns) or len(beats) >= 5)
    assert lease_holder(tmp_path)['pid'] == os.getpid() and not take_lease(tmp_path)
    lease.release()
    assert not lease_holder(tmp_path) and take_lease(tmp_path)


@pytest.mark.parametrize('cut', [0, 1, 40, -1])
def test_a_lease_cut_short_is_judged_by_its_age(tmp_path, cut):
    folder = tmp_path / 'run'
    path = take_lease(folder, beat=60).path
    path.write_text(path.read_text()[:cut])
    assert (
        lease_holder(folder) == dict(host=None, pid=None, since=None)
        and not take_lease(folder)
        and run_status(find_folders(runs=tmp_path))['running'] == 1
    )
    os.utime(path, (time.time() - STALE - 2,) * 2)
    assert (
        not lease_holder(folder)
        and run_status(find_folders(runs=tmp_path))['running'] == 0
        and take_lease(folder).path.name == 'lease.1.json'
    )


def test_a_wrong_local_clock_changes_nothing(tmp_path, monkeypatch):
    lease = take_lease(tmp_path)
    for off in (-3600, 3600):
        real = time.time
        monkeypatch.setattr(leases.time, 'time', lambda: real() + off)
        assert lease_holder(tmp_path) and not take_lease(tmp_path)
        monkeypatch.undo()
    lease.release()


def test_only_one_of_many_takes_over(tmp_path):
    "Eight processes find the same dead lease at the same moment, 10 times."
    for i in range(10):
        folder = tmp_path / str(i)
        path = take_lease(folder, beat=60).path
        os.utime(path, (0, 0))
        together, won = FORK.Barrier(8), FORK.SimpleQueue()

        def compete():
            together.wait()
            won.put(bool(take_lease(folder)))
            together.wait()
            os._exit(0)

        crowd = [FORK.Process(target=compete) for _ in range(8)]
        for p in crowd:
            p.start()
        for p in crowd:
            p.join()
        assert sum(won.get() for _ in crowd) == 1


def go_stale(path):
    "As if its holder had given no sign of life for long: it sleeps, or the machine does."
    os.utime(path, (time.time() - 2 * STALE,) * 2)


def test_a_suspended_holder_learns_that_its_run_was_taken_over(tmp_path, quick):
    "Stopped for longer than a lease lasts, it neither trains on nor overwrites, and returns the other's record."
    quick.setattr(leases, 'BEAT', 0.05)
    quick.setattr(experiments, '_train', stand_in(tmp_path, (HANGS, HANGS)))
    asleep = launcher(tmp_path, lambda folder: run(TINY, find_folders(runs=folder)))
    wait_for(lambda: notes(tmp_path, 'start'))
    kill_all(asleep, signal.SIGSTOP)
    wait_for(lambda: Path(f'/proc/{asleep.pid}/stat').read_text().rpartition(')')[2].split()[0] == 'T')
    go_stale(next((tmp_path / run_key(TINY)).glob('lease.*.json')))
    quick.setattr(experiments, '_train', stand_in(tmp_path))
    record, path = run(TINY, find_folders(runs=tmp_path)), tmp_path / run_key(TINY) / 'record.json'
    placed = path.stat().st_mtime_ns
    kill_all(asleep, signal.SIGCONT)
    assert outcome(asleep, tmp_path) == '' and record['by'] == os.getpid() and path.stat().st_mtime_ns == placed
    assert [line['pid'] for line in notes(tmp_path, 'end')] == [os.getpid()] and len(notes(tmp_path, 'start')) == 2
    assert [p.name for p in path.parent.iterdir()] == ['record.json']


def test_a_holder_that_wakes_while_the_other_trains_does_not_place_its_result(tmp_path):
    asleep = take_lease(tmp_path / run_key(TINY), beat=HANGS)
    go_stale(asleep.path)
    other = take_lease(tmp_path / run_key(TINY), beat=HANGS)
    with pytest.raises(leases.LeaseLost):
        experiments._place(dict(key=run_key(TINY)), tmp_path / run_key(TINY), asleep)
    assert sorted(p.name for p in (tmp_path / run_key(TINY)).iterdir()) == ['lease.0.json', 'lease.1.json']
    asleep.release()
    other.renew()
    other.release()


def test_what_a_killed_maker_left_beside_its_record_is_removed(tmp_path, quick):
    "Killed after it placed the record and before it tidied up: whoever comes next does, and makes nothing again."

    def leave(spec):
        folder = tmp_path / run_key(spec)
        (folder / 'checkpoints' / '000001').mkdir(parents=True)
        take_lease(folder, beat=HANGS)
        (folder / 'record.json').write_text(json.dumps(dict(key=run_key(spec), time=dict(seconds=1))))

    quick.setattr(experiments, '_train', lambda *args: pytest.fail('made again'))
    for make in (
        lambda: run_all([TINY], find_folders(runs=tmp_path), workers=1),
        lambda: run(TINY, find_folders(runs=tmp_path)),
    ):
        leave(TINY)
        make()
        assert [p.name for p in (tmp_path / run_key(TINY)).iterdir()] == ['record.json']


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_asked_to_end_it_drains(tmp_path, quick, number):
    """To the whole group, as a terminal or a cluster sends it: what is under way ends early, nothing new begins, and
    the next call goes on."""
    quick.setattr(experiments, '_train', stand_in(tmp_path, (10 * HANGS, 10 * HANGS)))
    process = launcher(tmp_path)
    wait_for(lambda: len({line['pid'] for line in notes(tmp_path, 'start')}) == 2)
    kill_all(process, number)
    said = outcome(process, tmp_path)
    assert said.startswith('Stopped: stopped: 0 of 9 runs are done') and 'were cut short' in said
    assert (
        len({line['pid'] for line in notes(tmp_path, 'start')}) == 2
        and not list(tmp_path.glob('*/error.txt'))
        and run_status(find_folders(runs=tmp_path))['running'] == 0
    )
    assert all(leases._started(line['pid']) is None for line in notes(tmp_path)), 'workers must end with their launcher'
    quick.setattr(experiments, '_train', stand_in(tmp_path))
    assert len(run_all(GRID, find_folders(runs=tmp_path), workers=2)) == 9


def test_asked_twice_it_ends_at_once(tmp_path, quick):
    quick.setattr(experiments, '_train', stand_in(tmp_path, (10 * HANGS, 10 * HANGS), heeds=False))
    process = launcher(tmp_path)
    wait_for(lambda: len(notes(tmp_path, 'start')) >= 2)

    def ask_again():
        kill_all(process, signal.SIGINT)
        return not process.is_alive()  # two signals at once may come as one

    wait_for(lambda: time.sleep(0.3) or ask_again())
    assert outcome(process, tmp_path).startswith('KeyboardInterrupt')
    assert all(leases._started(line['pid']) is None for line in notes(tmp_path)), 'workers must end with their launcher'


def test_one_run_drains_too(tmp_path, quick):
    quick.setattr(experiments, '_train', stand_in(tmp_path, (10 * HANGS, 10 * HANGS)))
    process = launcher(tmp_path, lambda folder: run(TINY, find_folders(runs=folder)))
    wait_for(lambda: notes(tmp_path, 'start'))
    kill_all(process, signal.SIGINT)
    assert outcome(process, tmp_path).startswith('Stopped: stopped; the same call goes on')


def test_a_failed_run_is_tried_again_only_when_asked(tmp_path, quick):
    good, tries = stand_in(tmp_path), tmp_path / 'tries'

    def fails(prepared, *args):
        if any(p.spec.learning_rate == 0.5 for p in prepared):
            with open(tries, 'a') as f:
                f.write('x')
            raise ValueError('out of luck')
        good(prepared, *args)

    quick.setattr(experiments, '_train', fails)
    some = [GRID[2], replace(GRID[3], learning_rate=0.5)]
    bad = tmp_path / run_key(some[1])
    for _ in range(2):
        with pytest.raises(
            RuntimeError,
            match='1 of . runs failed; the others are kept.*ValueError: out of luck.*'
            f'{bad.name}/error.txt.*--retry-failed',
        ):
            run_all(some, find_folders(runs=tmp_path), workers=1)
        assert tries.read_text() == 'x'
    log = (bad / 'error.txt').read_text()
    assert log.startswith('20') and '"learning_rate":0.5' in log.splitlines()[1] and 'Traceback' in log
    status = run_status(find_folders(runs=tmp_path))
    assert (status['done'], status['failed'], status['pending']) == (1, 1, 0) and status['logs'][0][
        'error'
    ] == 'ValueError: out of luck'
    with pytest.raises(RuntimeError):
        run_all(some, find_folders(runs=tmp_path), workers=1, retry_failed=True)
    assert tries.read_text() == 'xx'
    quick.setattr(experiments, '_train', good)
    assert run(some[1], find_folders(runs=tmp_path)) and [p.name for p in bad.iterdir()] == ['record.json']


def test_a_worker_that_dies_costs_one_run(tmp_path, quick):
    good = stand_in(tmp_path)

    def dies(prepared, *args):
        if any(p.spec.seed == 1 for p in prepared):
            os.kill(os.getpid(), signal.SIGKILL)
        good(prepared, *args)

    quick.setattr(experiments, '_train', dies)
    quick.setattr(experiments, '_bundles', lambda specs, workers: [list(specs)])
    with pytest.raises(RuntimeError, match='1 of 3 runs failed.*exit code -9.*memory'):
        run_all(GRID[:3], find_folders(runs=tmp_path), workers=1)
    assert len(list(tmp_path.glob('*/record.json'))) == 2 and not run_status(find_folders(runs=tmp_path))['running']


def test_failed_by_another_launcher_is_failed(tmp_path, quick):
    "Who waits for a run that another is at hears of its failure, and does not try again."

    def fails(prepared, *args):
        note(tmp_path, 'start', prepared[0].key)
        time.sleep(0.3)
        raise ValueError('no')

    quick.setattr(experiments, '_train', fails)
    pair = [launcher(tmp_path, lambda folder: run_all([TINY], find_folders(runs=folder), workers=1)) for _ in range(2)]
    assert all('1 of 1 runs failed' in outcome(p, tmp_path) for p in pair) and len(notes(tmp_path, 'start')) == 1


def test_a_caller_says_when_to_end_and_gets_what_is_made(tmp_path, quick, capsys):
    "Runs under way are asked to end as after Ctrl-C; the next call makes the rest."
    quick.setattr(experiments, '_train', stand_in(tmp_path, (10 * HANGS, 10 * HANGS)))
    folders = find_folders(runs=tmp_path)
    assert run_all(GRID, folders, workers=2, stop=lambda: bool(notes(tmp_path, 'start'))) == [None] * 9
    assert not notes(tmp_path, 'end') and not list(tmp_path.glob('*/error.txt'))
    quick.setattr(experiments, '_train', stand_in(tmp_path))
    assert [r['key'] for r in run_all(GRID, folders, workers=2)] == [run_key(s) for s in GRID]
    last = capsys.readouterr().err.split('\r')[-1]
    assert '100%' in last and '36/36' in last and '9 of 9 runs' in last


def test_a_grid_tells_of_updates_while_none_of_its_runs_is_done(tmp_path, quick):
    quick.setattr(experiments, '_bundles', lambda specs, workers: [list(specs)])
    goes_on, told = tmp_path / 'goes on', []

    def half(prepared, progress, done, stop):
        for _ in prepared:
            progress(2, 0.5)
        wait_for(goes_on.exists)
        for p in prepared:
            done(dict(key=p.key))

    def updates(runs, workers):
        told.append(count(runs, workers))
        if told[-1]:
            goes_on.touch()
        return told[-1]

    count = experiments._updates
    quick.setattr(experiments, 'POLL', 0)
    quick.setattr(experiments, '_train', half)
    quick.setattr(experiments, '_updates', updates)
    run_all(GRID[:3], find_folders(runs=tmp_path), workers=1)
    assert told == sorted(told) and told[-1] == 12 and any(0 < n <= 6 for n in told)


def test_status_tells_what_runs_where(tmp_path, quick, main):
    quick.setattr(experiments, '_train', stand_in(tmp_path, (10 * HANGS, 10 * HANGS)))
    (tmp_path / 'runs').mkdir()
    process = launcher(tmp_path, lambda folder: run_all(GRID, find_folders(runs=folder / 'runs'), workers=2))
    wait_for(lambda: len({n['pid'] for n in notes(tmp_path, 'start')}) == 2)
    now = lambda: json.loads(main('status', '--json')[1])
    wait_for(
        lambda: now()['running'] == len(notes(tmp_path, 'start'))
    )  # a lease is taken before its run says that it begins
    status = now()
    assert (
        status['done'],
        status['running'],
        status['failed'],
        status['done'] + status['running'] + status['failed'] + status['pending'],
    ) == (0, len(notes(tmp_path, 'start')), 0, 9)
    assert {p['pid'] for p in status['processes']} == {line['pid'] for line in notes(tmp_path, 'start')} and all(
        p['host'] and p['since'] for p in status['processes']
    )
    assert f'process {status["processes"][0]["pid"]}' in main('status')[1]
    kill_all(process)
    process.join()
    if leases._where():
        wait_for(lambda: now()['running'] == 0)


def test_retry_is_asked_for_on_the_command_line(main, monkeypatch):
    asked = []
    monkeypatch.setattr('dsbs.evidence.reporting.reproduce', lambda wanted: asked.append(wanted.retry_failed) or [])
    assert main('reproduce', '--retry-failed')[0] == 0 and main('reproduce')[0] == 0 and asked == [True, False]


REAL = """
import sys
from dataclasses import replace
from dsbs.records import find_folders
from dsbs.runs.experiments import run_all
from dsbs.runs.specs import RunSpec
base = RunSpec(student='scratch-32x1', max_steps=60, eval_every=20, batch_size=16, learning_rate=1e-3, engine='plain')
grid = [replace(base, n_train=n, seed=s, subset_seed=s) for n in (40, 64) for s in range(4)]
run_all(grid, find_folders(runs=sys.argv[1]), workers=1)
"""


@pytest.mark.slow
def test_two_real_launchers_one_of_them_killed(tmp_path):
    """With real trainings: the survivor ends with all records, keeps those that were there, and they are what one
    process makes alone."""
    from making import record_of

    from dsbs.runs.verifying import same_numbers

    pair = [
        subprocess.Popen([sys.executable, '-c', REAL, tmp_path], cwd=ROOT, process_group=0, stderr=subprocess.DEVNULL)
        for _ in range(2)
    ]
    records = lambda: {p: p.stat().st_mtime_ns for p in tmp_path.glob('*/record.json')}
    wait_for(lambda: len(records()) >= 2 and len(run_status(find_folders(runs=tmp_path))['processes']) == 2)
    os.killpg(pair[0].pid, signal.SIGKILL)
    pair[0].wait()
    kept = records()
    assert pair[1].wait(HANGS) == 0
    after = records()
    assert len(after) == 8 and all(after[p] == t for p, t in kept.items()) and not list(tmp_path.glob('*/lease.*'))
    record = json.loads(max(after, key=after.get).read_text())
    assert same_numbers(record) == same_numbers(record_of(RunSpec(**record['spec']))), (
        'the plain engine trains each alone: the same computation'
    )
