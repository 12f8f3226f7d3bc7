"Live teachers: faults, kills, secrets, pace."
import asyncio, base64, json, os, random, signal, subprocess, sys, time
from pathlib import Path
from urllib.parse import quote

import pytest

from dsbs.extraction import Reading, read_set
from dsbs.tasks import load_task
from dsbs.teacher import AnswerStore, Clock, Question, Sampling, Server, ask_all
from stub_server import LASTING, PASSING, Stub, completion, faults

ROOT = Path(__file__).resolve().parents[1]
DSBS = str(Path(sys.executable).parent/'dsbs')


class Hasty(Clock):
    "Waits pass a thousand times faster; a wait of ten minutes is still waited for."
    def __init__(self): self.longest = 0.
    def time(self): return 1000*time.monotonic()
    async def sleep(self, seconds): self.longest = max(self.longest, seconds); await asyncio.sleep(seconds/1000)


def questions(n, word='question'): return [Question(f'r{i}', ({'role':'user', 'content':f'{word} {i}'},), 'p') for i in range(n)]


@pytest.mark.parametrize('n, share', [(150, .9), pytest.param(1000, .2, marks=pytest.mark.slow)])
def test_prompts_and_twenty_kinds_of_fault(tmp_path, n, share):
    fault, asked, clock = faults(share), questions(n), Hasty()
    expected = {q.id:fault(q.asked[0]['content']) for q in asked}
    assert set(expected.values()) == {None, *PASSING, *LASTING}
    with Stub(fault) as stub:
        store = AnswerStore(tmp_path/'answers.sqlite')
        result = ask_all(asked, Server(stub.url, 'm'), store, concurrency=16, clock=clock)
        again = ask_all(asked, Server(stub.url, 'm'), store, concurrency=16, clock=clock)
    assert {id:a.reason for (id, _), a in result.answers.items()} == {id:LASTING.get(f, '') for id, f in expected.items()}
    assert result.sent == n + sum(f in PASSING and f != 'slow' for f in expected.values())
    assert clock.longest > 500
    paid_twice = [text for text, n in stub.served.items() if n > 1 and fault(text) not in PASSING]
    refused = list(expected.values()).count('status 400')
    assert not paid_twice and refused and (again.sent, again.answers) == (refused, result.answers) and len(store) == n-refused


def test_budget_is_never_passed(tmp_path):
    with Stub() as stub:
        result = ask_all(questions(200), Server(stub.url, 'm'), AnswerStore(tmp_path/'a.sqlite'), Sampling(max_tokens=20), concurrency=8, budget=1500)
    assert result.stopped == 'budget' and 1300 < result.tokens <= 1500 and sum(stub.served.values())*30 == result.tokens


@pytest.fixture
def far_stub():
    "The address of a stub that answers after two seconds, in a process of its own."
    running = subprocess.Popen([sys.executable, str(ROOT/'tests'/'stub_server.py'), '2'], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    yield running.stdout.readline().strip()
    running.stdin.close(); running.wait(10)


def test_pace(tmp_path, far_stub):
    "At a fixed latency, throughput is at least 95% of what the concurrency allows (the best of three: other work on the machine is not ours to judge)."
    store, shares = AnswerStore(tmp_path/'a.sqlite'), []
    ask_all(questions(1, 'warm'), Server(far_stub, 'm'), store)
    while len(shares) < 3 and max(shares, default=0) < .95:
        server, start = Server(far_stub, 'm'), time.perf_counter()
        assert ask_all(questions(24, f'time {len(shares)}'), server, store, concurrency=8).sent == 24
        shares.append(24/(time.perf_counter()-start) / (8/2.))
    assert max(shares) >= .95, shares


@pytest.mark.parametrize('status', [401, 200])
def test_the_key_is_written_nowhere(tmp_path, status):
    key = 'sk-canary/0123+abc'
    echo = f'bad key {key} {quote(key, safe="")} {base64.b64encode(key.encode()).decode()} {base64.b64encode(f"Bearer {key}".encode()).decode()}'
    class Telltale(Stub):
        def _reply(self, fault, asked): return (status, '', completion(echo) if status == 200 else json.dumps({'error':{'message':echo}}).encode())
    with Telltale() as stub:
        done = subprocess.run([DSBS, 'extract', 'same_kind', '--base-url', stub.url, '--model', 'm', '--limit', '4', '--out', str(tmp_path/'set')], capture_output=True, text=True, cwd=ROOT,
                              env=os.environ | {'OPENAI_API_KEY':key, 'DSBS_RUNS':str(tmp_path/'runs')})
    assert done.returncode in (1, 2) and done.stderr.strip()
    written = [done.stdout, done.stderr] + [p.read_bytes().decode('latin-1') for p in tmp_path.rglob('*') if p.is_file()]
    assert (tmp_path/'runs').is_dir()
    coded = [key, quote(key, safe=''), *(base64.b64encode(b'\0'*i+key.encode()).decode().rstrip('=')[i+1:-1] for i in range(3))]
    assert not [c for c in coded for text in written if c in text or c[4:] in text]


def extract_command(stub, tmp_path, *more):
    return [DSBS, 'extract', 'same_kind', '--base-url', stub.url, '--model', 'm', '--limit', '60', '--concurrency', '4', '--out', str(tmp_path/'set'), '--json', *more]


@pytest.mark.parametrize('kills', [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_repeat_at_most_what_was_under_way(tmp_path, kills):
    env, rng = os.environ | {'DSBS_RUNS':str(tmp_path/'runs')}, random.Random(kills)
    limit = ('--limit', '60' if kills < 5 else '400')
    with Stub(latency=.3) as stub:
        for _ in range(kills):
            served = sum(stub.served.values())
            started = subprocess.Popen(extract_command(stub, tmp_path, *limit), cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while sum(stub.served.values()) < served+4 and started.poll() is None: time.sleep(.01)
            time.sleep(rng.random()*.8)
            started.send_signal(signal.SIGKILL); started.wait()
        done = subprocess.run(extract_command(stub, tmp_path, *limit), cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        twice = sum(n-1 for n in stub.served.values())
        with Stub() as calm:
            assert subprocess.run(extract_command(calm, tmp_path, *limit, '--out', str(tmp_path/'calm')), cwd=ROOT, env=env, capture_output=True).returncode == 0
    assert twice <= kills*4
    assert (tmp_path/'set'/'train.jsonl').read_bytes() == (tmp_path/'calm'/'train.jsonl').read_bytes()
    assert json.loads(done.stdout)['kept'] == int(limit[1])


@pytest.mark.parametrize('options, words', [
    (['--model', 'm'], ['--base-url']), (['--base-url', 'localhost:8000', '--model', 'm'], ["'localhost:8000'", 'http://']), (['--base-url', 'http://127.0.0.1:9/v1'], ['--model']),
    (['--base-url', 'http://127.0.0.1:9/v1', '--model', 'm', '--samples', '0'], ['samples']), (['--base-url', 'http://127.0.0.1:9/v1', '--model', 'm', '--form', 'haiku'], ['haiku', 'chat']),
    (['--base-url', 'http://127.0.0.1:9/v1', '--model', 'm', '--split', 'dev'], ["'dev'", 'validation'])])
def test_a_wrong_call_gets_one_line(main, options, words):
    status, out, err = main('extract', 'same_kind', *options)
    assert status == 2 and not out and err.count('\n') == 1 and all(w in err for w in words), err


def test_too_many_failures_end_with_1(dsbs, tmp_path):
    with Stub(lambda text: 'refusal') as stub:
        status, out, err = dsbs('extract', 'same_kind', '--base-url', stub.url, '--model', 'm', '--limit', '10', '--out', tmp_path/'set', '--json')
    assert status == 1 and '10 of 10' in err and len((tmp_path/'set'/'train.failures.jsonl').read_text().splitlines()) == 10
    assert {json.loads(l)['reason'] for l in (tmp_path/'set'/'train.failures.jsonl').read_text().splitlines()} == {'refusal'}


def test_training_reads_a_rationale_set_as_it_reads_the_recorded_one(dsbs, tmp_path):
    with Stub() as stub:
        status, out, err = dsbs('extract', 'same_kind', '--base-url', stub.url, '--model', 'm', '--limit', '64', '--out', tmp_path/'set', '--json')
    card = json.loads(out)
    assert status == 0 and {'requested', 'kept', 'failed', 'sent', 'tokens'} <= set(card) and (card['requested'], card['kept'], card['sent']) == (64, 64, 64)
    settings = ['student=scratch-32x1', 'max_steps=4', 'eval_every=4', 'batch_size=8']
    one, two = (json.loads(dsbs('run', *settings, *more, '--json')[1]) for more in ([f'teacher={tmp_path/"set"}'], []))
    assert (one['metrics']['n_rationales'], two['metrics']['n_rationales'], one['key'] != two['key']) == (64, 720, True)


@pytest.fixture(scope='module')
def tiny_llm(tmp_path_factory):
    "A folder with a tiny random chat model."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from dsbs.student import train_tokenizer
    from dsbs.tasks import embedded_task
    folder = tmp_path_factory.mktemp('llm')
    tokenizer = train_tokenizer([*embedded_task('same_kind')['train']['input'], 'Because they are birds. So the answer is yes. So the answer is no.'])
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=2048,
                         pad_token_id=0, eos_token_id=1, bos_token_id=1)
    LlamaForCausalLM(config).save_pretrained(folder); tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def server(tiny_llm):
    "`transformers serve` on a free port: its address."
    import socket, urllib.request
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    command = [str(Path(sys.executable).parent/'transformers'), 'serve', str(tiny_llm), '--device', 'cpu', '--port', str(port)]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | {'HF_HUB_OFFLINE':'1'})
    for _ in range(240):
        try: urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=2); break
        except OSError: time.sleep(.5)
        if running.poll() is not None: raise AssertionError(running.stderr.read().decode()[-2000:])
    yield f'http://127.0.0.1:{port}/v1'
    running.terminate(); running.wait(20)


def test_a_real_server(dsbs, server, tiny_llm, tmp_path):
    call = ['extract', 'same_kind', '--base-url', server, '--model', tiny_llm, '--limit', '20', '--max-tokens', '12', '--max-failed', '1', '--out', tmp_path/'set', '--json']
    status, out, err = dsbs(*call)
    first = json.loads(out)
    assert status == 0, err
    assert (first['requested'], first['sent'], first['kept']+first['failed']) == (20, 20, 20) and first['tokens'] > 20*50
    assert json.loads(dsbs(*call)[1])['sent'] == 0


@pytest.mark.parametrize('form', ['chat', 'completion'])
def test_a_local_model(dsbs, tiny_llm, tmp_path, form):
    call = ['extract', 'same_kind', '--local', '--model', tiny_llm, '--limit', '3', '--max-tokens', '8', '--form', form, '--max-failed', '1', '--out', tmp_path/'set', '--json']
    first, again = (json.loads(dsbs(*call)[1]) for _ in range(2))
    assert (first['sent'], again['sent'], first['kept']+first['failed']) == (3, 0, 3)


def test_self_consistency(dsbs, tmp_path):
    class Wavering(Stub):
        def _reply(self, fault, asked):
            n = sum(self.served.values())
            return 200, '', completion('One reason. So the answer is no.' if n % 3 == 0 else f'Reason {n % 3}. So the answer is yes.')
    with Wavering() as stub:
        status, out, err = dsbs('extract', 'same_kind', '--base-url', stub.url, '--model', 'm', '--limit', '5', '--samples', '3', '--concurrency', '1', '--out', tmp_path/'set', '--json')
    rows = [json.loads(l) for l in (tmp_path/'set'/'train.jsonl').read_text().splitlines()]
    assert status == 0 and json.loads(out)['sent'] == 15
    assert [(r['label'], r['rationale'], r['votes'], r['others']) for r in rows] == [('yes', 'Reason 1.', 2, ['Reason 2.'])]*5
    read = read_set(tmp_path/'set', load_task('same_kind'), 'train')
    assert [read[r['id']] for r in rows] == [Reading('Reason 1.', 'yes')]*5


def test_a_task_folder_works_as_a_built_in_task(dsbs, tmp_path):
    task = tmp_path/'mood'; task.mkdir()
    (task/'task.toml').write_text('name = "mood"\ninstruction = "Is the guest happy?"\nanswer = "label"\nlabels = ["Happy", "Not happy"]\n')
    (task/'train.jsonl').write_text(''.join(json.dumps(dict(input=f'Guest {i} says the {"pie was good" if i % 2 else "soup was cold"}.') | (dict(label='Happy' if i % 2 else 'Not happy') if i < 40 else {}))+'\n' for i in range(60)))
    (task/'exemplars.jsonl').write_text(json.dumps(dict(input='Best cake!', rationale='Praise.', label='Happy'))+'\n')
    assert dsbs('run', f'task={task}', 'max_steps=2')[0] == 2
    class Critic(Stub):
        def _reply(self, fault, asked): return 200, '', completion('A word of praise. So the answer is happy.' if 'pie' in asked['messages'][-1]['content'] else 'A complaint. So the answer is Not happy.')
    with Critic() as stub:
        for split in ('train', 'validation', 'test'):
            status, out, err = dsbs('extract', task, '--base-url', stub.url, '--model', 'm', '--split', split, '--out', tmp_path/'set', '--json')
            assert status == 0 and json.loads(out)['accuracy'] == 100, err
    status, out, err = dsbs('run', f'task={task}', f'teacher={tmp_path/"set"}', 'student=scratch-32x1', 'max_steps=60', 'eval_every=20', 'batch_size=16', 'learning_rate=5e-3', 'dropout=0',
                            '--save', tmp_path/'student', '--json')
    record = json.loads(out)
    assert status == 0 and 'are the teacher' in record['stand_in'] and record['metrics']['test_accuracy'] > 60
    assert (tmp_path/'student'/'README.md').is_file() and list((tmp_path/'student').glob('*.safetensors'))
    assert dsbs('run', f'task={task}', f'teacher={tmp_path/"set"}', 'max_steps=2', '--save', tmp_path/'student')[0] == 2
    assert dsbs('run', 'task=same_kind', f'teacher={tmp_path/"set"}', 'max_steps=2')[0] == 2


def test_ctrl_c_keeps_what_is_under_way(tmp_path):
    env = os.environ | {'DSBS_RUNS':str(tmp_path/'runs')}
    with Stub(latency=.5) as stub:
        started = subprocess.Popen(extract_command(stub, tmp_path), cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) # a shell's background job ignores it
        while sum(stub.served.values()) < 6 and started.poll() is None: time.sleep(.01)
        time.sleep(.2); started.send_signal(signal.SIGINT)
        assert started.wait(30) == 1 and 'what is finished is kept' in started.stderr.read()
        assert subprocess.run(extract_command(stub, tmp_path), cwd=ROOT, env=env, capture_output=True).returncode == 0
    assert set(stub.served.values()) == {1} and len(stub.served) == 60


def test_the_own_preset_wants_its_folders(main):
    for call, words in ((['--preset', 'own'], '--task FOLDER and --teacher FOLDER'), (['--preset', 'smoke', '--task', 'x'], 'go with --preset own')):
        status, out, err = main('reproduce', 'fig4', *call)
        assert status == 2 and err.count('\n') == 1 and words in err


@pytest.mark.slow
def test_figure_4_of_a_task_of_ones_own(dsbs, tmp_path):
    task = tmp_path/'mood'; task.mkdir()
    (task/'task.toml').write_text('name = "mood"\ninstruction = "Is the guest happy?"\nanswer = "label"\nlabels = ["happy", "angry"]\n')
    (task/'train.jsonl').write_text(''.join(json.dumps(dict(input=f'Guest {i} says the {"pie was good" if i % 2 else "soup was cold"}.', label='happy' if i % 2 else 'angry'))+'\n' for i in range(80)))
    (task/'exemplars.jsonl').write_text(json.dumps(dict(input='Best cake!', rationale='Praise.', label='happy'))+'\n')
    class Critic(Stub):
        def _reply(self, fault, asked): return 200, '', completion('A word of praise. So the answer is happy.' if 'pie' in asked['messages'][-1]['content'] else 'A complaint. So the answer is angry.')
    with Critic() as stub: assert dsbs('extract', task, '--base-url', stub.url, '--model', 'm', '--out', tmp_path/'set')[0] == 0
    status, out, err = dsbs('reproduce', 'fig4', '--preset', 'own', '--task', task, '--teacher', tmp_path/'set', '--reports', tmp_path/'reports', '--json', timeout=900)
    assert status == 0, err
    assert {Path(p).name for p in json.loads(out)['written']} == {'fig4_data_size_human_mood.png', 'fig4_data_size_human_mood.svg', 'own.jsonl', 'fig4_data_size_human.own.ipynb'}
    assert str(tmp_path) not in (tmp_path/'reports'/'own'/'notebooks'/'fig4_data_size_human.own.ipynb').read_text()
