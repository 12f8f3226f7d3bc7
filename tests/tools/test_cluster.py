"""Runs as jobs of Snakemake: what is written, and that the same folders come out, on this machine and on a Slurm of
one node."""

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from dsbs.evidence.grids import grid, specs_of
from dsbs.evidence.reporting import Reproduction
from dsbs.records import Folders, find_folders
from dsbs.runs.specs import RunSpec, make_spec, run_key
from dsbs.tools.cluster import PROFILES, Workflow, emit_snakemake, jobs_table, run_settings, snakefile

ROOT = Path(__file__).resolve().parents[2]
FIGURE = 'rationale_weight'  # two runs at preset smoke


def snakemake_program():
    found = os.environ.get('DSBS_SNAKEMAKE') or ROOT / '.venv-cluster' / 'bin' / 'snakemake'
    if not Path(found).is_file():
        pytest.skip('needs Snakemake in an environment of its own: make cluster, or set DSBS_SNAKEMAKE')
    return str(found)


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project folder that is not this checkout, with its runs beside it, and where commands are called."
    shutil.copytree(
        ROOT / 'nbs', tmp_path / 'project' / 'nbs', ignore=shutil.ignore_patterns('tutorials', '.ipynb_checkpoints')
    )
    shutil.copy(ROOT / 'settings.ini', tmp_path / 'project')
    monkeypatch.chdir(tmp_path / 'project')
    monkeypatch.delenv('DSBS_RUNS', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    return tmp_path / 'project'


def snakemake(project, *args, profile='local', jobs='jobs', **options):
    command = [snakemake_program(), '-s', f'{jobs}/Snakefile', '--profile', f'{jobs}/profiles/{profile}', *args]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=1800, **options)


def emitted(names, preset, folder, data=None):
    return emit_snakemake(Reproduction(names, preset, folders=find_folders(data)), folder)


def table(folder):
    names = {}
    exec((Path(folder) / 'runs.smk').read_text(), names)
    return names['SPECS'], names['FIGURES']


def one_line(result, *words):
    status, out, err = result
    assert status == 2 and not out and len([line for line in err.splitlines() if line.strip()]) == 1, result
    for word in words:
        assert word in err, err


def test_written_twice_it_is_the_same(project, main):
    files = lambda: {
        p.relative_to(project / 'jobs'): p.read_bytes() for p in (project / 'jobs').rglob('*') if p.is_file()
    }

    def emit():
        os.chdir(project)
        from dsbs.tools.cli import main

        assert main(['reproduce', FIGURE, 'fig6', '--preset', 'smoke', '--emit', 'snakemake', 'jobs']) == 0

    emit()
    before = files()
    (project / 'jobs' / 'profiles' / 'slurm' / 'config.yaml').write_text('jobs: 7\n')
    emit()
    after = files()
    changed = Path('profiles/slurm/config.yaml')
    assert {p for p in before if after[p] != before[p]} == {changed} and after[changed] == b'jobs: 7\n', (
        'a profile that someone changed is kept'
    )
    assert {str(p) for p in before} == {
        'Snakefile',
        'runs.smk',
        'README.md',
        *(f'profiles/{name}/config.yaml' for name in PROFILES),
    }
    specs, figures = table(project / 'jobs')
    assert set(figures[FIGURE]) == {run_key(s) for s in specs_of(grid(FIGURE, 'smoke'))} and set().union(
        *figures.values()
    ) == set(specs)
    assert str(project) not in ''.join(b.decode() for b in before.values()), (
        'paths inside the project are relative to it'
    )


def test_paper_runs_ask_for_gpus_and_others_for_none(project, recorded, fetched):
    paper, smoke = (
        emitted(['rationale_weight'], preset, project / preset, recorded)[0].parent for preset in ('paper', 'smoke')
    )
    specs, _ = table(paper)
    assert len(specs) == 20 and {s['gpu'] for s in specs.values()} == {1}
    assert all(
        s['mem_mb'] > 10_000 and 30 < s['runtime'] < 600 and 'dtype=bfloat16' in s['settings'] for s in specs.values()
    )
    assert (
        "gpu=lambda w: SPECS[w.key]['gpu']" in (paper / 'Snakefile').read_text()
        and 'gpu=' not in (smoke / 'Snakefile').read_text()
    )
    assert {s['gpu'] for s in table(smoke)[0].values()} == {0}
    one = emitted(['table2'], 'smoke', project / 'more', recorded)[0].parent
    assert (one / 'Snakefile').read_text().count('rule run') == 1


def test_snakemake_reads_the_paper_grid(project, recorded, fetched):
    emitted(['rationale_weight'], 'paper', 'jobs', recorded)
    said = (done := snakemake(project, '--dry-run', profile='slurm')).stdout + done.stderr
    assert done.returncode == 0 and re.search(r'^run_gpu +20$', said, re.MULTILINE) and said.count('gpu=1') >= 20, said


def test_a_run_that_asks_for_several_gpus_gets_as_many_processes(project, recorded, fetched):
    code = emitted(['rationale_weight'], 'paper', project / 'jobs', recorded)[0].read_text()
    specs = {str(n): dict(gpu=n, settings=["task=it's"]) for n in (0, 1, 8)}
    there = dict(DSBS='some where/dsbs', DATA='data', SPECS=specs)
    exec('import os, shlex, shutil\n' + code[code.index('def dsbs(') : code.index('rule all')], there)
    alone = ['some where/dsbs', 'run', "task=it's", '--data-dir', 'data']
    assert [shlex.split(there['run'](k)) for k in '01'] == [alone, alone]
    assert shlex.split(there['run']('8')) == [
        'some where/accelerate',
        'launch',
        '--config_file',
        'configs/fsdp2.yaml',
        '--main_process_port',
        '0',
        '--num_processes',
        '8',
        *alone,
    ]
    assert (ROOT / 'configs' / 'fsdp2.yaml').is_file()


def test_the_words_of_a_job_are_its_run():
    odd = RunSpec(
        task="/tmp/it's {a} $task; x",
        teacher='/tmp/{{rationales}}',
        stand_in=False,
        rationale_weight=0.0,
        train_fraction=0.3,
        label_source='teacher',
        accumulation=2,
    )
    for spec in (odd, RunSpec(task='esnli', stand_in=True), RunSpec(n_train=3, extra='same_kind', n_extra=2)):
        assert make_spec(dict(w.split('=', 1) for w in run_settings(spec))) == spec


@pytest.mark.parametrize(
    'before, args, words',
    [
        ({}, ['fig6', '--preset', 'smoke', '--emit', 'make', 'jobs'], ["unknown engine 'make'", 'snakemake']),
        (
            {'jobs/mine.txt': 'x'},
            ['fig6', '--preset', 'smoke', '--emit', 'snakemake', 'jobs'],
            ['jobs: there is something already', 'new folder'],
        ),
        (
            {'jobs/Snakefile': 'rule all:\n'},
            ['fig6', '--preset', 'smoke', '--emit', 'snakemake', 'jobs'],
            ['there is something already'],
        ),
        ({'jobs': 'x'}, ['fig6', '--preset', 'smoke', '--emit', 'snakemake', 'jobs'], ['is a file']),
        ({}, ['fig6', '--preset', 'recorded', '--emit', 'snakemake', 'jobs'], ['preset of a workflow']),
        (
            {},
            ['fig6', '--preset', 'search', '--emit', 'snakemake', 'jobs'],
            ["unknown preset of fig6_model_size_human 'search'"],
        ),
        ({}, ['fig99', '--emit', 'snakemake', 'jobs'], ["unknown figure 'fig99'"]),
        ({}, ['fig6', '--preset', 'own', '--emit', 'snakemake', 'jobs'], ['preset own needs --task']),
        ({}, ['fig6', '--emit', 'snakemake'], ['expected 2 arguments']),
        (
            {},
            ['rationale_weight', '--preset', 'paper', '--data-dir', 'nowhere', '--emit', 'snakemake', 'jobs'],
            ['20 of 20 runs cannot be named', 'cqa_train.json', '--dry-run'],
        ),
    ],
    ids=[
        'engine',
        'folder in use',
        'a Snakefile of theirs',
        'a file',
        'nothing to run',
        'not of the figure',
        'no such figure',
        'own without a task',
        'no folder',
        'no data',
    ],
)
def test_a_wrong_call_writes_nothing_and_says_why(project, capsys, before, args, words):
    from dsbs.tools.cli import main

    for name, text in before.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text)
    files = lambda: sorted(str(p) for p in project.rglob('*'))
    were = files()
    one_line((main(['reproduce', *args]), *capsys.readouterr()), *words)
    assert files() == were


def test_a_runs_folder_with_braces_is_refused(project, monkeypatch):
    monkeypatch.setenv('DSBS_RUNS', 'my {runs}')
    with pytest.raises(ValueError, match='takes braces for wildcards'):
        emitted(['fig6'], 'smoke', 'jobs')


@pytest.mark.parametrize('name', PROFILES)
def test_profiles_are_of_a_form_that_snakemake_takes(project, name):
    "Only the form: this says nothing about a Kubernetes cluster."
    emitted([FIGURE], 'smoke', 'jobs')
    assert yaml.safe_load(PROFILES[name])['executor'] == name
    here = (
        ['--config', f'root={project}', '--default-storage-prefix', str(project / 'storage')]
        if name == 'kubernetes'
        else []
    )
    done = snakemake(project, '--dry-run', *here, profile=name)
    assert done.returncode == 0 and re.search(r'^run +2$', done.stdout + done.stderr, re.MULTILINE), done.stderr


STAND_IN = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
words = sys.argv[1:]
if words[0] == 'run':
    key = 'ab'+dict(w.split('=', 1) for w in words[1:-2])['student'][-1]
    record = Path(os.environ['DSBS_RUNS'])/key/'record.json'; record.parent.mkdir(parents=True, exist_ok=True)
    if record.exists(): words = 'kept'
    else: record.write_text(key)
with open('said.jsonl', 'a') as f: f.write(json.dumps(words)+chr(10))
"""


@pytest.fixture
def odd_jobs(project, monkeypatch):
    "Two runs with odd names, and a command that only writes down how it is called: (start, what it said)."
    odd, say = 'it\'s {my} "task" $HOME; touch pwned {wildcards.key}', project / 'say me'
    say.write_text(STAND_IN)
    say.chmod(0o755)
    specs = {f'ab{i}': RunSpec(task=f'/{odd}', student=f'scratch-32x{i}') for i in (1, 2)}
    folders = Folders(project / odd, project / "my 'runs'", project / odd)
    wanted = Reproduction([FIGURE], 'own', folders=folders, task=f'/{odd}', teacher=odd)
    flow = Workflow(wanted, project / 'jobs', {FIGURE: specs})
    (project / 'jobs' / 'profiles' / 'local').mkdir(parents=True)
    (project / 'jobs' / 'profiles' / 'local' / 'config.yaml').write_text(PROFILES['local'])
    (project / 'jobs' / 'Snakefile').write_text(snakefile(flow))
    (project / 'jobs' / 'runs.smk').write_text(jobs_table(flow))

    def start(*args):
        (project / 'said.jsonl').unlink(missing_ok=True)
        done = snakemake(project, *args, '--config', f'dsbs={say}')
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in (project / 'said.jsonl').read_text().splitlines()]

    return odd, start


def test_odd_names_reach_the_command_as_they_are(project, odd_jobs):
    """Quotes, blanks, dollars and braces of a task's, a data or a reports folder: neither the shell nor Snakemake
    reads anything into them."""
    odd, start = odd_jobs
    said = start()
    assert sorted(said[:2]) == [['run', f'task=/{odd}', f'student=scratch-32x{i}', '--data-dir', odd] for i in (1, 2)]
    assert said[2:] == [
        [
            'reproduce',
            FIGURE,
            '--preset',
            'own',
            '--reports',
            odd,
            '--task',
            f'/{odd}',
            '--teacher',
            odd,
            '--data-dir',
            odd,
        ]
    ]
    assert not list(project.rglob('pwned')) and {
        p.parent.name for p in (project / "my 'runs'").glob('*/record.json')
    } == {'ab1', 'ab2'}


def test_a_record_stays_even_when_its_job_is_started_again(project, odd_jobs):
    "As after a kill of Snakemake itself, which then takes what the job wrote for half done."
    _, start = odd_jobs
    start()
    assert start('--force', "my 'runs'/ab1/record.json") == ['kept'], 'dsbs run must find the record, not train again'


def folders(project):  # every file of runs and reports: what must be equal, which for figures is every byte
    from dsbs.runs.verifying import same_numbers

    files = [p for top in ('runs', 'reports') for p in (project / top).rglob('*') if p.is_file()]

    def content(p):
        if p.name == 'record.json':
            return same_numbers(json.loads(p.read_text()))
        if p.suffix == '.jsonl':
            return sorted(same_numbers(json.loads(line)) for line in p.read_text().splitlines())
        return (
            p.read_bytes() if p.suffix in ('.png', '.svg', '.json') else p.name
        )  # an executed notebook names the results it was made from, which hold times

    return {str(p.relative_to(project)): content(p) for p in files}


@pytest.fixture(scope='module')
def made_here(tmp_path_factory):
    "What a plain `dsbs reproduce` leaves."
    snakemake_program()
    project = tmp_path_factory.mktemp('here')
    shutil.copytree(ROOT / 'nbs', project / 'nbs', ignore=shutil.ignore_patterns('tutorials', '.ipynb_checkpoints'))
    shutil.copy(ROOT / 'settings.ini', project)
    env = {k: v for k, v in os.environ.items() if k != 'DSBS_RUNS'}
    done = subprocess.run(
        [Path(sys.executable).parent / 'dsbs', 'reproduce', FIGURE, '--preset', 'smoke'],
        cwd=project,
        env=env,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    return folders(project)


def records(project):
    return {p: p.stat().st_mtime_ns for p in (project / 'runs').glob('*/record.json')}


@pytest.mark.slow
def test_the_local_executor_leaves_the_same_folders(project, made_here):
    emitted([FIGURE], 'smoke', 'jobs')
    done = snakemake(project)
    assert done.returncode == 0, done.stderr
    assert folders(project) == made_here and any(name.endswith('.svg') for name in made_here)


@pytest.fixture
def slurm(monkeypatch):
    "A Slurm of one node, of this process only."
    for name in ('munged', 'slurmctld', 'slurmd', 'sinfo'):
        if not shutil.which(name, path=f'{os.environ["PATH"]}:/usr/sbin'):
            pytest.skip(f'needs Slurm and MUNGE ({name} is not installed): apt-get install slurm-wlm munge')
    if os.getuid():
        pytest.skip('needs root to start a Slurm of its own')
    top, host, started = Path(tempfile.mkdtemp(prefix='dsbs-slurm-')), socket.gethostname().split('.')[0], []
    top.chmod(0o755)
    for name in ('state', 'spool', 'munge', 'bin'):
        (top / name).mkdir()
    (top / 'munge' / 'key').write_bytes(secrets.token_bytes(128))
    (top / 'munge' / 'key').chmod(0o400)
    free = []
    for _ in range(2):
        s = socket.socket()
        s.bind(('127.0.0.1', 0))
        free.append(s)
    ports = [s.getsockname()[1] for s in free]
    for s in free:
        s.close()
    conf = top / 'slurm.conf'
    conf.write_text(f"""ClusterName=dsbs
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={top}/munge/socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=sched_interval=1,bf_interval=1
StateSaveLocation={top}/state
SlurmdSpoolDir={top}/spool
SlurmctldPidFile={top}/slurmctld.pid
SlurmdPidFile={top}/slurmd.pid
SlurmctldLogFile={top}/slurmctld.log
SlurmdLogFile={top}/slurmd.log
ReturnToService=2
KillWait=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=20000 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
""")
    srun = top / 'bin' / 'srun'  # jobs are without this variable: Snakemake's plugin drops those of Slurm
    srun.write_text(f'#!/bin/sh\nSLURM_CONF={conf} exec {shutil.which("srun")} "$@"\n')
    srun.chmod(0o755)
    monkeypatch.setenv('SLURM_CONF', str(conf))
    monkeypatch.setenv('PATH', f'{top}/bin:{os.environ["PATH"]}:/usr/sbin')

    def start(*command):
        with open(top / f'{Path(command[0]).name}.out', 'w') as out:
            started.append(subprocess.Popen(list(map(str, command)), stdout=out, stderr=out, start_new_session=True))

    def ask(*command):
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    try:
        start(
            'munged',
            '-F',
            '--force',
            f'--key-file={top}/munge/key',
            f'--socket={top}/munge/socket',
            f'--pid-file={top}/munge/pid',
            f'--log-file={top}/munge/log',
            f'--seed-file={top}/munge/seed',
        )
        deadline = time.time() + 600
        while not (top / 'munge' / 'socket').exists() and time.time() < deadline:
            time.sleep(0.1)
        start('slurmctld', '-D', '-f', conf)
        start('slurmd', '-D', '-f', conf, '-N', host)
        while (said := ask('sinfo', '-h', '-o', '%T').stdout.strip()) != 'idle' and time.time() < deadline:
            time.sleep(0.5)
        logs = lambda: ''.join(p.read_text()[-2000:] for p in (*top.glob('*.log'), *top.glob('*.out')))
        assert said == 'idle', f'{said}\n{logs()}'
        yield ask
    finally:
        if len(started) == 3:
            ask('scancel', '--full', '--user=root')
            until = time.time() + 120
            while ask('squeue', '-h').stdout.strip() and time.time() < until:
                time.sleep(0.5)
        for process in reversed(started):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(top, ignore_errors=True)


@pytest.mark.slow
def test_slurm_leaves_the_same_folders_though_jobs_are_killed(project, slurm, made_here):
    emitted([FIGURE], 'smoke', 'jobs')
    command = [snakemake_program(), '-s', 'jobs/Snakefile', '--profile', 'jobs/profiles/slurm']
    with open(project.parent / 'log', 'w') as log:
        first = subprocess.Popen([*command, '--retries', '0', '--jobs', '1'], cwd=project, stdout=log, stderr=log)
    try:
        deadline = time.time() + 1800
        while not records(project) and time.time() < deadline:
            time.sleep(0.2)
        gone = None  # the next job: killed as soon as it trains
        while not gone and time.time() < deadline:
            running = [p for p in (project / 'runs').glob('*/lease.*') if not (p.parent / 'record.json').exists()]
            if running and len(records(project)) == 1:
                gone = slurm('squeue', '-h', '-t', 'R', '-o', '%i').stdout.split()
                slurm('scancel', *gone)
            time.sleep(0.2)
        assert gone, (project.parent / 'log').read_text()
        assert first.wait(1800) != 0
    finally:
        if first.poll() is None:
            first.kill()
            first.wait()
    before = records(project)
    assert len(before) == 1 and not list((project / 'reports').rglob('*.svg')), (project.parent / 'log').read_text()
    again = snakemake(project, profile='slurm')
    assert again.returncode == 0, again.stderr
    after = records(project)
    assert len(after) == 2 and all(after[p] == t for p, t in before.items()), 'nothing is trained twice'
    assert folders(project) == made_here
    assert (again.stdout + again.stderr).count('has been submitted with SLURM jobid') == 2, again.stderr
