"Live teachers: faults, kills, secrets, pace."

import asyncio
import base64
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from stub_server import LASTING, PASSING, Stub, completion, faults

from dsbs.data.tasks import load_task
from dsbs.records import WorkFailed
from dsbs.teacher.extraction import Reading
from dsbs.teacher.live import Clock, ask_all
from dsbs.teacher.questions import Answer, AnswerStore, Question, Sampling, answer_key
from dsbs.teacher.servers import Server
from dsbs.teacher.sets import read_set

ROOT = Path(__file__).resolve().parents[2]
DSBS = str(Path(sys.executable).parent / 'dsbs')


class Hasty(Clock):
    "Waits pass a thousand times faster; a wait of ten minutes is still waited for."

    def __init__(self):
        self.longest = 0.0

    def time(self):
        return 1000 * time.monotonic()

    async def sleep(self, seconds):
        self.longest = max(self.longest, seconds)
        await asyncio.sleep(seconds / 1000)


def call_of(url, *more, task='same_kind', model='m'):
    "Arguments of `dsbs extract`."
    return ['extract', task, '--base-url', url, '--model', model, *more]


def questions(n, word='question'):
    return [Question(f'r{i}', ({'role': 'user', 'content': f'{word} {i}'},), 'p') for i in range(n)]


@pytest.mark.parametrize('n, share', [(150, 0.9), pytest.param(1000, 0.2, marks=pytest.mark.slow)])
def test_prompts_and_twenty_kinds_of_fault(tmp_path, n, share):
    fault, asked, clock = faults(share), questions(n), Hasty()
    expected = {q.id: fault(q.asked[0]['content']) for q in asked}
    assert set(expected.values()) == {None, *PASSING, *LASTING}
    with Stub(fault) as stub:
        store = AnswerStore(tmp_path / 'answers.sqlite')
        result = ask_all(asked, Server(stub.url, 'm'), store, concurrency=16, clock=clock)
        paid = [q for q in asked if expected[q.id] != 'status 400']
        again = ask_all(paid, Server(stub.url, 'm'), store, concurrency=16, clock=clock)
    assert {id: a.reason for (id, _), a in result.answers.items()} == {
        id: LASTING.get(f, '') for id, f in expected.items()
    }
    assert result.sent == n + sum(f in PASSING and f != 'slow' for f in expected.values())
    assert clock.longest > 500
    paid_twice = [text for text, n in stub.served.items() if n > 1 and fault(text) not in PASSING]
    assert not paid_twice and len(paid) < n and len(store) == len(paid)
    assert again.sent == 0 and again.answers == {
        key: a for key, a in result.answers.items() if expected[key[0]] != 'status 400'
    }


def test_budget_is_never_passed(tmp_path):
    with Stub() as stub:
        store = AnswerStore(tmp_path / 'a.sqlite')
        result = ask_all(
            questions(200), Server(stub.url, 'm'), store, Sampling(max_tokens=20), concurrency=8, budget=1500
        )
    assert result.stopped == 'budget' and 1300 < result.tokens <= 1500
    assert sum(stub.served.values()) * 30 == result.tokens


class Crowd:
    "A teacher that answers only when so many questions are under way at once."

    endpoint, model = 'nowhere', 'm'

    def __init__(self, size):
        self.size, self.barrier = size, None

    async def ask(self, question, sampling):
        if question.id == 'r0':
            return Answer('The first, alone.', completion_tokens=1)
        self.barrier = self.barrier or asyncio.Barrier(self.size)
        await asyncio.wait_for(self.barrier.wait(), 600)
        return Answer('Because.', completion_tokens=1)


def test_as_many_questions_are_under_way_as_may_be(tmp_path):
    "Also whenever some have been answered, as long as there are others: fewer would wait here for ever."
    asked = ask_all(questions(1 + 24), Crowd(8), AnswerStore(tmp_path / 'a.sqlite'), concurrency=8)
    assert asked.sent == 25 and {a.reason for a in asked.answers.values()} == {''}


@pytest.mark.parametrize('status', [401, 200])
def test_the_key_is_written_nowhere(tmp_path, status):
    key = 'sk-canary/0123+abc'
    coded = [base64.b64encode(text.encode()).decode() for text in (key, f'Bearer {key}')]
    echo = ' '.join(['bad key', key, quote(key, safe=''), *coded])

    class Telltale(Stub):
        def _reply(self, fault, asked):
            return status, '', completion(echo) if status == 200 else error(echo)

    with Telltale() as stub:
        done = subprocess.run(
            [DSBS, *call_of(stub.url, '--limit', '4', '--out', str(tmp_path / 'set'))],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {'OPENAI_API_KEY': key, 'DSBS_RUNS': str(tmp_path / 'runs')},
        )
    assert done.returncode in (1, 2) and done.stderr.strip()
    written = [done.stdout, done.stderr] + [
        p.read_bytes().decode('latin-1') for p in tmp_path.rglob('*') if p.is_file()
    ]
    assert (tmp_path / 'runs').is_dir()
    coded = [
        key,
        quote(key, safe=''),
        *(base64.b64encode(b'\0' * i + key.encode()).decode().rstrip('=')[i + 1 : -1] for i in range(3)),
    ]
    assert not [c for c in coded for text in written if c in text or c[4:] in text]


def extract_command(stub, tmp_path, *more):
    settings = ['--limit', '60', '--concurrency', '4', '--out', str(tmp_path / 'set'), '--json']
    return [DSBS, *call_of(stub.url, *settings, *more)]


@pytest.mark.parametrize('kills', [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_repeat_at_most_what_was_under_way(tmp_path, kills):
    env, rng = os.environ | {'DSBS_RUNS': str(tmp_path / 'runs')}, random.Random(kills)
    limit = ('--limit', '60' if kills < 5 else '400')
    with Stub(latency=0.3) as stub:
        for _ in range(kills):
            served = sum(stub.served.values())
            started = subprocess.Popen(
                extract_command(stub, tmp_path, *limit),
                cwd=ROOT,
                env=env,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            while sum(stub.served.values()) < served + 4 and started.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.random() * 0.8)
            started.send_signal(signal.SIGKILL)
            started.wait()
        done = subprocess.run(
            extract_command(stub, tmp_path, *limit), cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        twice = sum(n - 1 for n in stub.served.values())
        with Stub() as calm:
            assert (
                subprocess.run(
                    extract_command(calm, tmp_path, *limit, '--out', str(tmp_path / 'calm')),
                    cwd=ROOT,
                    env=env,
                    capture_output=True,
                ).returncode
                == 0
            )
    assert twice <= kills * 4
    assert (tmp_path / 'set' / 'train.jsonl').read_bytes() == (tmp_path / 'calm' / 'train.jsonl').read_bytes()
    assert json.loads(done.stdout)['kept'] == int(limit[1])


@pytest.mark.parametrize(
    'options, words',
    [
        (['--model', 'm'], ['--base-url']),
        (['--base-url', 'localhost:8000', '--model', 'm'], ["'localhost:8000'", 'http://']),
        (['--base-url', 'http://127.0.0.1:9/v1'], ['--model']),
        (['--base-url', 'http://127.0.0.1:9/v1', '--model', 'm', '--samples', '0'], ['samples']),
        (['--base-url', 'http://127.0.0.1:9/v1', '--model', 'm', '--form', 'haiku'], ['haiku', 'chat']),
        (['--base-url', 'http://127.0.0.1:9/v1', '--model', 'm', '--split', 'dev'], ["'dev'", 'validation']),
    ],
)
def test_a_wrong_call_gets_one_line(main, options, words):
    status, out, err = main('extract', 'same_kind', *options)
    assert status == 2 and not out and err.count('\n') == 1 and all(w in err for w in words), err


def test_too_many_failures_end_with_1(dsbs, tmp_path):
    with Stub(lambda text: 'refusal') as stub:
        status, out, err = dsbs(*call_of(stub.url, '--limit', '10', '--out', tmp_path / 'set', '--json'))
    failures = (tmp_path / 'set' / 'train.failures.jsonl').read_text().splitlines()
    assert status == 1 and '10 of 10' in err and len(failures) == 10
    assert {json.loads(line)['reason'] for line in failures} == {'refusal'}


def test_training_reads_a_rationale_set_as_it_reads_the_recorded_one(dsbs, tmp_path):
    with Stub() as stub:
        status, out, err = dsbs(*call_of(stub.url, '--limit', '64', '--out', tmp_path / 'set', '--json'))
    card = json.loads(out)
    assert status == 0 and {'requested', 'kept', 'failed', 'sent', 'tokens'} <= set(card)
    assert (card['requested'], card['kept'], card['sent']) == (64, 64, 64)
    settings = ['student=scratch-32x1', 'max_steps=4', 'eval_every=4', 'batch_size=8']
    one, two = (
        json.loads(dsbs('run', *settings, *more, '--json')[1]) for more in ([f'teacher={tmp_path / "set"}'], [])
    )
    assert (one['metrics']['n_rationales'], two['metrics']['n_rationales'], one['key'] != two['key']) == (64, 720, True)


@pytest.fixture(scope='module')
def tiny_llm(tmp_path_factory):
    "A folder with a tiny random chat model."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dsbs.data.embedded import embedded_task
    from dsbs.method.student import train_tokenizer

    folder = tmp_path_factory.mktemp('llm')
    tokenizer = train_tokenizer(
        [
            *embedded_task('same_kind')['train']['input'],
            'Because they are birds. So the answer is yes. So the answer is no.',
        ]
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=2048,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def server(tiny_llm):
    "`transformers serve` on a free port: its address."
    import socket
    import urllib.request

    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    transformers = str(Path(sys.executable).parent / 'transformers')
    command = [transformers, 'serve', str(tiny_llm), '--device', 'cpu', '--port', str(port)]
    running = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | {'HF_HUB_OFFLINE': '1'}
    )
    for _ in range(2400):
        try:
            urllib.request.urlopen(f'http://127.0.0.1:{port}/health', timeout=2)
            break
        except OSError:
            time.sleep(0.5)
        if running.poll() is not None:
            raise AssertionError(running.stderr.read().decode()[-2000:])
    yield f'http://127.0.0.1:{port}/v1'
    running.terminate()
    running.wait(300)


def test_a_real_server(dsbs, server, tiny_llm, tmp_path):
    settings = ['--limit', '20', '--max-tokens', '12', '--max-failed', '1', '--out', tmp_path / 'set', '--json']
    call = call_of(server, *settings, model=tiny_llm)
    status, out, err = dsbs(*call)
    first = json.loads(out)
    assert status == 0, err
    assert (first['requested'], first['sent'], first['kept'] + first['failed']) == (20, 20, 20)
    assert first['tokens'] > 20 * 50
    assert json.loads(dsbs(*call)[1])['sent'] == 0


@pytest.mark.parametrize('form', ['chat', 'completion'])
def test_a_local_model(dsbs, tiny_llm, tmp_path, form):
    settings = ['--limit', '3', '--max-tokens', '8', '--max-failed', '1', '--out', tmp_path / 'set', '--json']
    call = ['extract', 'same_kind', '--local', '--model', tiny_llm, '--form', form, *settings]
    first, again = (json.loads(dsbs(*call)[1]) for _ in range(2))
    assert (first['sent'], again['sent'], first['kept'] + first['failed']) == (3, 0, 3)


def test_self_consistency(dsbs, tmp_path):
    class Wavering(Stub):
        def _reply(self, fault, asked):
            n = sum(self.served.values()) % 3
            text = f'Reason {n}. So the answer is yes.' if n else 'One reason. So the answer is no.'
            return 200, '', completion(text)

    settings = ['--limit', '5', '--samples', '3', '--concurrency', '1', '--out', tmp_path / 'set', '--json']
    with Wavering() as stub:
        status, out, err = dsbs(*call_of(stub.url, *settings))
    rows = [json.loads(line) for line in (tmp_path / 'set' / 'train.jsonl').read_text().splitlines()]
    assert status == 0 and json.loads(out)['sent'] == 15
    assert [(r['label'], r['rationale'], r['votes'], r['others']) for r in rows] == [
        ('yes', 'Reason 1.', 2, ['Reason 2.'])
    ] * 5
    read = read_set(tmp_path / 'set', load_task('same_kind'), 'train')
    assert [read[r['id']] for r in rows] == [Reading('Reason 1.', 'yes')] * 5


def mood_task(folder, labels, n, labeled):
    "A task folder: is the guest happy? The first `labeled` of `n` rows have a label."
    folder.mkdir()
    (folder / 'task.toml').write_text(
        f'name = "mood"\ninstruction = "Is the guest happy?"\nanswer = "label"\nlabels = {json.dumps(labels)}\n'
    )
    rows = []
    for i in range(n):
        row = dict(input=f'Guest {i} says the {"pie was good" if i % 2 else "soup was cold"}.')
        rows.append(row | (dict(label=labels[0] if i % 2 else labels[1]) if i < labeled else {}))
    (folder / 'train.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    exemplar = dict(input='Best cake!', rationale='Praise.', label=labels[0])
    (folder / 'exemplars.jsonl').write_text(json.dumps(exemplar) + '\n')
    return folder


class Critic(Stub):
    "A teacher that is happy with pie alone."

    def __init__(self, happy, unhappy):
        super().__init__()
        self.happy, self.unhappy = happy, unhappy

    def _reply(self, fault, asked):
        pie = 'pie' in asked['messages'][-1]['content']
        text = (
            f'A word of praise. So the answer is {self.happy}.'
            if pie
            else f'A complaint. So the answer is {self.unhappy}.'
        )
        return 200, '', completion(text)


def test_a_task_folder_works_as_a_built_in_task(dsbs, tmp_path):
    task = mood_task(tmp_path / 'mood', ['Happy', 'Not happy'], 60, labeled=40)
    assert dsbs('run', f'task={task}', 'max_steps=2')[0] == 2
    with Critic('happy', 'Not happy') as stub:
        for split in ('train', 'validation', 'test'):
            status, out, err = dsbs(
                *call_of(stub.url, '--split', split, '--out', tmp_path / 'set', '--json', task=task)
            )
            assert status == 0 and json.loads(out)['accuracy'] == 100, err
    own = [f'task={task}', f'teacher={tmp_path / "set"}']
    settings = [
        'student=scratch-32x1',
        'max_steps=60',
        'eval_every=20',
        'batch_size=16',
        'learning_rate=5e-3',
        'dropout=0',
    ]
    status, out, err = dsbs('run', *own, *settings, '--save', tmp_path / 'student', '--json')
    record = json.loads(out)
    assert status == 0 and 'are the teacher' in record['stand_in'] and record['metrics']['test_accuracy'] > 60
    assert (tmp_path / 'student' / 'README.md').is_file() and list((tmp_path / 'student').glob('*.safetensors'))
    assert dsbs('run', *own, 'max_steps=2', '--save', tmp_path / 'student')[0] == 2
    assert dsbs('run', 'task=same_kind', own[1], 'max_steps=2')[0] == 2


def test_ctrl_c_keeps_what_is_under_way(tmp_path):
    env = os.environ | {'DSBS_RUNS': str(tmp_path / 'runs')}
    with Stub(latency=0.5) as stub:
        started = subprocess.Popen(
            extract_command(stub, tmp_path),
            cwd=ROOT,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # a shell's background job ignores it
        while sum(stub.served.values()) < 6 and started.poll() is None:
            time.sleep(0.01)
        time.sleep(0.2)
        started.send_signal(signal.SIGINT)
        assert started.wait(1800) == 1 and 'what is finished is kept' in started.stderr.read()
        assert subprocess.run(extract_command(stub, tmp_path), cwd=ROOT, env=env, capture_output=True).returncode == 0
    assert set(stub.served.values()) == {1} and len(stub.served) == 60


def test_the_own_preset_wants_its_folders(main):
    for call, words in (
        (['--preset', 'own'], '--task FOLDER and --teacher FOLDER'),
        (['--preset', 'smoke', '--task', 'x'], 'go with --preset own'),
    ):
        status, out, err = main('reproduce', 'fig4', *call)
        assert status == 2 and err.count('\n') == 1 and words in err


@pytest.mark.slow
def test_figure_4_of_a_task_of_ones_own(dsbs, tmp_path):
    task = mood_task(tmp_path / 'mood', ['happy', 'angry'], 80, labeled=80)
    with Critic('happy', 'angry') as stub:
        assert dsbs(*call_of(stub.url, '--out', tmp_path / 'set', task=task))[0] == 0
    folders = ['--task', task, '--teacher', tmp_path / 'set', '--reports', tmp_path / 'reports']
    status, out, err = dsbs('reproduce', 'fig4', '--preset', 'own', *folders, '--json', timeout=3600)
    assert status == 0, err
    assert {Path(p).name for p in json.loads(out)['written']} == {
        'fig4_data_size_human_mood.png',
        'fig4_data_size_human_mood.svg',
        'own.jsonl',
        'fig4_data_size_human.own.ipynb',
        'index.html',
    }
    notebook = tmp_path / 'reports' / 'own' / 'notebooks' / 'fig4_data_size_human.own.ipynb'
    assert str(tmp_path) not in notebook.read_text()


# what every row would share


def error(message, **more):
    return json.dumps(dict(error=dict(message=message, **more))).encode()


class Says(Stub):
    "A stub that answers by a function of what was asked: (status, headers, body); None for a good answer."

    def __init__(self, reply):
        super().__init__()
        self.says, self.count = reply, 0

    def _reply(self, fault, asked):
        self.count += 1
        return self.says(asked) or (200, '', completion(model=asked['model']))


@pytest.fixture
def extract(main, tmp_path):
    "Ask a stub about 20 rows: (exit status, result or None, standard error without its bar, requests, card or None)."

    def call(stub, *more, url=None, model='m', out='set'):
        before, card = stub.count, tmp_path / out / 'train.card.json'
        settings = ['--limit', '20', '--out', tmp_path / out, '--json', *more]
        status, printed, err = main(*call_of(url or stub.url, *settings, model=model))
        err = '\n'.join(line for line in err.replace('\r', '\n').splitlines() if '%|' not in line and line.strip())
        printed = json.loads(printed) if printed else None
        written = json.loads(card.read_text()) if card.is_file() else None
        return status, printed, err, stub.count - before, written

    return call


QUOTA = error('You exceeded your current quota, please check your plan and billing details.', code='insufficient_quota')
EVERY_ROW = {  # status, body, exit status, requests, words
    'quota': (429, QUOTA, 1, 3, ['You exceeded your current quota', 'billing']),
    'payment': (402, error('Insufficient credits'), 1, 3, ['Insufficient credits', 'does not pass']),
    'payment in a 200': (200, error('Insufficient credits', code=402), 1, 3, ['Insufficient credits']),
    'key': (401, b'<html><title>Unauthorized</title></html>', 2, 1, ['$OPENAI_API_KEY', 'Unauthorized']),
    'region': (403, error('Country, region, or territory not supported'), 2, 1, ['region, or territory']),
    'model': (
        404,
        error('The model `m` does not exist', code='model_not_found'),
        2,
        1,
        ["'m'", '/models', 'does not exist'],
    ),
    'model 400': (400, error('invalid model ID'), 2, 1, ['/models', 'invalid model ID']),
    'route': (404, b'{"detail":"Not Found"}', 2, 1, ['OpenAI-compatible', 'Not Found']),
    'method': (405, b'{"detail":"Method Not Allowed"}', 2, 1, ['Method Not Allowed']),
    'other server': (501, b'<html><title>Error response</title></html>', 2, 1, ['OpenAI-compatible', 'Error response']),
    'context': (
        400,
        error("This model's maximum context length is 512 tokens. However, you requested 1024."),
        1,
        3,
        ['--max-tokens', 'maximum context length'],
    ),
    'filter': (
        400,
        error('The content management policy was triggered', code='content_filter'),
        1,
        3,
        ['filters such inputs'],
    ),
    'moderation': (403, error('Your input was flagged'), 1, 3, ['flagged']),
    'unknown': (
        400,
        b'{"message":"Unrecognized request argument","error":"Bad Request"}',
        1,
        3,
        ['Unrecognized request argument'],
    ),
    'range': (
        422,
        b'{"detail":[{"loc":["body","max_tokens"],"msg":"must be at most 100","input":256}]}',
        1,
        3,
        ['body.max_tokens: must be at most 100', '--max-tokens'],
    ),
    'broken': (500, error('Internal error'), 1, 24, ['Internal error', 'status 500']),
    'gateway': (502, b'<html><title>Bad Gateway</title></html>', 1, 24, ['Bad Gateway']),
    'page': (200, b'<html><title>Sign in</title></html>', 1, 24, ['Sign in', 'OpenAI-compatible']),
    'error object': (200, b'{"object":"error","message":"bad thing"}', 1, 24, ['bad thing']),
    'empty': (200, b'', 1, 24, ['not JSON']),
}


@pytest.mark.parametrize('name', EVERY_ROW)
def test_what_every_row_would_share_is_found_by_the_first_few(extract, tmp_path, name):
    code, body, expected, most, words = EVERY_ROW[name]
    with Says(lambda asked: (code, '', body)) as stub:
        status, printed, err, sent, card = extract(stub)
    assert (status, printed, card) == (expected, None, None) and sent <= most, err
    assert err.count('\n') == 0 and all(w in err for w in words), err
    assert len(AnswerStore(tmp_path / 'runs' / 'answers.sqlite')) == 0


def test_messages_that_differ_in_numbers_and_names_are_alike(extract):
    def reply(asked):
        number, text = hash(str(asked)), asked['messages'][-1]['content']
        return 400, '', error(f'Request req_{number:x} failed at {len(str(asked))}: {text!r}')

    with Says(reply) as stub:
        assert extract(stub)[3] == 3


@pytest.mark.parametrize(
    'tail, meant', [('', '/v1'), ('/api/chat', '/v1'), ('/v1/models', '/v1'), ('/v1/chat/completions', '/v1')]
)
def test_a_wrong_address_is_told_with_the_right_one(extract, tail, meant):
    def reply(asked):
        return 200, '', json.dumps(dict(error='Unexpected endpoint or method. (POST /chat/completions)')).encode()

    with Says(reply) as stub:
        home = stub.url.removesuffix('/v1')
        status, printed, err, sent, card = extract(stub, url=home + tail)
    told = err.replace('did you mean http', 'did you mean --base-url http')
    assert status == 2 and sent <= 1 and f'did you mean --base-url {home + meant}?' in told, err


def nobody():
    "An address at which nobody listens."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return f'http://127.0.0.1:{s.getsockname()[1]}/v1'


@pytest.mark.parametrize(
    'url, words',
    [(None, ['connection refused', 'is a server running']), ('http://nowhere.invalid/v1', ['no such host'])],
)
def test_a_server_that_is_not_there_is_left_after_three_requests(tmp_path, url, words):
    sent = []
    with pytest.raises(WorkFailed) as e:
        ask_all(
            questions(60),
            Server(url or nobody(), 'm'),
            AnswerStore(tmp_path / 'a.sqlite'),
            progress=lambda done, n, tokens: sent.append(n),
            clock=Hasty(),
        )
    assert max(sent) == 3 and all(w in str(e.value) for w in words), e.value


def test_a_proxy_in_the_way_is_named(extract, monkeypatch):
    for name in ('http_proxy', 'https_proxy', 'all_proxy', 'no_proxy'):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv('HTTP_PROXY', nobody().replace('//', '//me:secret@'))
    with Says(lambda asked: None) as stub:
        status, printed, err, sent, card = extract(stub)
        assert (status, sent) == (1, 0) and 'secret' not in err
        assert all(w in err for w in ('$HTTP_PROXY', 'NO_PROXY=127.0.0.1,localhost', 'connection refused')), err
        monkeypatch.setenv('NO_PROXY', '127.0.0.1')
        assert extract(stub)[0] == 0
    with Says(lambda asked: (502, '', b'<html><title>Proxy error</title></html>')) as proxy:
        monkeypatch.setenv('HTTP_PROXY', proxy.url.removesuffix('/v1'))
        status, printed, err, sent, card = extract(proxy, url='http://10.0.0.1:8000/v1', out='other')
    assert status == 1 and '$HTTP_PROXY' in err and 'NO_PROXY=10.0.0.1' in err and 'Proxy error' in err


def test_what_was_refused_is_asked_again(extract):
    ready = []
    with Says(lambda asked: None if ready else (400, '', error('Not yet'))) as stub:
        assert extract(stub)[0] == 1
        ready.append(True)
        status, printed, err, sent, card = extract(stub)
    assert (status, printed['kept'], sent) == (0, 20, 20)


def test_refusals_of_an_older_store_are_not_replayed(tmp_path):
    store, asked = AnswerStore(tmp_path / 'a.sqlite'), questions(2)
    with Says(lambda asked: None) as stub:
        for q, reason in zip(asked, ('request refused (400)', 'wrong model')):
            key = answer_key(q, stub.url, 'm', Sampling())
            store.put(key, dict(endpoint=stub.url, model='m'), Answer(reason=reason))
        first, again = (ask_all(asked, Server(stub.url, 'm'), store) for _ in range(2))
    assert (first.sent, again.sent, [a.reason for a in again.answers.values()]) == (2, 0, ['', ''])


def test_one_refused_row_among_good_ones_stays_one_failure(extract):
    row = load_task('same_kind')['train']['input'][4]

    def reply(asked):
        return (400, '', error('Filtered', code='content_filter')) if row in asked['messages'][-1]['content'] else None

    with Says(reply) as stub:
        first, again = extract(stub), extract(stub)
    assert [(c[0], c[1]['kept'], c[1]['failed'], c[3]) for c in (first, again)] == [(0, 19, 1, 20), (0, 19, 1, 1)]


# asked otherwise


def picky(asked):
    "A model of the newer kind: neither max_tokens nor a temperature nor a system role."
    if 'max_tokens' in asked:
        says = "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        return 400, '', error(f'Unsupported parameter: {says}', param='max_tokens')
    if 'temperature' in asked:
        says = "'temperature' does not support 0 with this model. Only the default (1) value is supported."
        return 400, '', error(f'Unsupported value: {says}')
    if any(m['role'] == 'system' for m in asked.get('messages', ())):
        return 500, '', error('Conversation roles must alternate user/assistant')
    if 'max_completion_tokens' not in asked:
        return 400, '', error('no limit')


def no_stop(asked):
    if 'stop' in asked:
        says = dict(type='extra_forbidden', loc=['body', 'stop'], msg='Extra inputs are not permitted')
        return 422, '', json.dumps(dict(detail=[says])).encode()
    goes_on = ' Because. So the answer is yes.\n\nQ: And more?\nA: Hm'
    return 200, '', json.dumps(dict(model='m', choices=[dict(text=goes_on, finish_reason='length')])).encode()


@pytest.mark.parametrize(
    'reply, options, changed',
    [
        (
            picky,
            [],
            ['max_completion_tokens for max_tokens', 'no temperature', 'the instruction before the first question'],
        ),
        (no_stop, ['--form', 'completion'], ['no stop texts']),
    ],
)
def test_a_model_is_asked_as_it_wants_to_be(extract, reply, options, changed):
    with Says(reply) as stub:
        first, again = extract(stub, *options), extract(stub, *options)
    assert (first[0], first[1]['kept'], first[3], again[0], again[3]) == (0, 20, 20 + len(changed), 0, 0)
    assert first[2].count('\n') == len(changed) - 1 and all(c in first[2] for c in changed), first[2]
    for card in (first[4], again[4]):
        assert all(c in card['changed'][0] for c in changed)
        assert (card['sampling_sent']['temperature'] is None) == ('no temperature' in changed)


def test_a_temperature_out_of_range_is_not_left_out(extract):
    with Says(lambda asked: (400, '', error('temperature must be at most 2', param='temperature'))) as stub:
        status, printed, err, sent, card = extract(stub, '--temperature', '3')
    assert (status, sent) == (1, 3) and '--temperature' in err


# paid, whatever it says


def thought(content, **message):
    choice = dict(message=dict(content=content, **message), finish_reason='length')
    return 200, '', completion(choices=[choice])


@pytest.mark.parametrize(
    'reply', [thought(None, reasoning_content='Hm'), thought('', reasoning=['Hm']), thought('Because')]
)
def test_an_answer_that_is_cut_short_is_paid_once(extract, tmp_path, reply):
    with Says(lambda asked: reply) as stub:
        status, printed, err, sent, card = extract(stub)
        assert (status, sent, printed['tokens'], printed['failed']) == (1, 3, 90, 3)
        assert 'cut short' in err and 'raise --max-tokens' in err, err
        failures = [json.loads(line) for line in (tmp_path / 'set' / 'train.failures.jsonl').read_text().splitlines()]
        assert [f['reason'] for f in failures] == ['cut short'] * 3
        status, printed, err, sent, card = extract(stub, '--max-failed', '1')
        assert (status, sent, printed['tokens'], printed['failed']) == (0, 17, 17 * 30, 20)
        assert extract(stub, '--max-failed', '1')[3] == 0


def test_a_budget_holds_for_answers_of_no_use(extract):
    costly = completion(None, 'length', usage=dict(prompt_tokens=1300, completion_tokens=256))
    with Says(lambda asked: (200, '', costly)) as stub:
        status, printed, err, sent, card = extract(stub, '--budget', '5000', '--max-failed', '1')
    assert status == 1 and sent == 3 and printed['tokens'] == 3 * 1556 and 'budget' in err


@pytest.mark.parametrize(
    'message',
    [
        dict(content=None, tool_calls=[{}]),
        dict(content=None),
        dict(content=' '),
        dict(content=[dict(type='thinking', thinking='Hm')]),
    ],
)
def test_a_paid_reply_without_a_text_is_counted(extract, message):
    with Says(lambda asked: (200, '', completion(choices=[dict(message=message, finish_reason='stop')]))) as stub:
        status, printed, err, sent, card = extract(stub, '--max-failed', '1')
    assert (printed['tokens'], sent, card['quality']['reasons']) == (600, 20, {'empty': 20})


def test_parts_are_joined(extract):
    parts = [
        dict(type='thinking', thinking=[dict(type='text', text='So the answer is no.')]),
        dict(type='text', text='Because. '),
        'So the answer is yes.',
    ]
    with Says(lambda asked: (200, '', completion(parts))) as stub:
        status, printed, err, sent, card = extract(stub)
    assert (status, printed['kept'], sent) == (0, 20, 20)


# names of models


def test_another_model_ends_the_call_and_its_answer_is_kept(extract):
    with Says(lambda asked: (200, '', completion(model='gpt-3.5-turbo-0125'))) as stub:
        for sent in (1, 0):
            status, printed, err, n, card = extract(stub, model='qwen3')
            assert (status, printed, n) == (2, None, sent)
            assert "'qwen3'" in err and '--served-model gpt-3.5-turbo-0125' in err, err
        status, printed, err, n, card = extract(stub, '--served-model', 'gpt-3.5-turbo', model='qwen3')
    assert (status, printed['kept'], n, card['served'], card['model']) == (0, 20, 19, ['gpt-3.5-turbo-0125'], 'qwen3')


def test_the_name_that_was_served_stands_in_the_card(extract):
    with Says(lambda asked: (200, '', completion(model='/models/Qwen3-0.6B-Q4_0.gguf'))) as stub:
        status, printed, err, n, card = extract(stub, model='qwen3')
    assert (status, card['served']) == (0, ['/models/Qwen3-0.6B-Q4_0.gguf'])


# in the middle


@pytest.mark.parametrize(
    'code, body', [(429, QUOTA), (402, error('Payment required')), (401, error('The key has expired'))]
)
def test_what_begins_in_the_middle_ends_the_call_and_keeps_what_was_paid(extract, code, body):
    used_up = []
    with Says(lambda asked: (code, '', body) if used_up or stub.count > 6 else None) as stub:
        status, printed, err, sent, card = extract(stub, '--concurrency', '1')
        assert (status, printed['kept'], card['stopped']) == (1, 6, 'failing') and sent <= 16
        assert json.loads(body)['error']['message'][:15] in err, err
        stub.says = lambda asked: None
        assert extract(stub)[3] == 14


class Dying(Stub):
    "A server that goes away after nine answers."

    def _reply(self, fault, asked):
        if sum(self.served.values()) < 9:
            return super()._reply(fault, asked)
        self.server.close()
        raise ConnectionError


def test_a_server_that_goes_down_is_waited_for_and_left(tmp_path):
    with Dying() as stub:
        asked = ask_all(questions(200), Server(stub.url, 'm'), AnswerStore(tmp_path / 'a.sqlite'), clock=Hasty())
    assert (asked.stopped, sum(not a.reason for a in asked.answers.values())) == ('failing', 9)
    assert asked.sent < 100 and 'connection refused' in asked.why


@pytest.mark.parametrize('code, headers', [(503, ''), (429, ''), (503, 'Retry-After: 60\r\n')])
def test_a_server_that_is_busy_at_first_is_waited_for(tmp_path, code, headers):
    with Says(lambda asked: (code, headers, error('Loading model')) if stub.count <= 9 else None) as stub:
        asked = ask_all(questions(40), Server(stub.url, 'm'), AnswerStore(tmp_path / 'a.sqlite'), clock=Hasty())
    assert (asked.stopped, asked.sent, sum(not a.reason for a in asked.answers.values())) == ('', 49, 40)


class Watched(Server):
    "Notes how many questions are under way; all answers but the first ones wait until eight are."

    def __init__(self, url, at_once, alone):
        super().__init__(url, 'm')
        self.at_once, self.alone, self.under_way, self.full = at_once, alone, 0, asyncio.Event()

    async def ask(self, question, sampling):
        self.under_way += 1
        self.at_once.append(self.under_way)
        if self.under_way == 8:
            self.full.set()
        try:
            answer = await super().ask(question, sampling)
            if len(self.at_once) > self.alone:
                await asyncio.wait_for(self.full.wait(), 600)
            return answer
        finally:
            self.under_way -= 1


def test_a_new_server_is_asked_one_question_first(tmp_path):
    store, new, known = AnswerStore(tmp_path / 'a.sqlite'), [], []
    with Stub() as stub:
        ask_all(questions(12), Watched(stub.url, new, alone=1), store)
        ask_all(questions(12, 'more'), Watched(stub.url, known, alone=0), store)
    assert new[:2] == [1, 1] and max(new) == 8
    assert known[:8] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize('key', ['\u201csk-a\u201d', 'sk a'])
def test_a_key_that_cannot_be_one_is_told_and_not_shown(extract, monkeypatch, key):
    monkeypatch.setenv('OPENAI_API_KEY', key)
    with Says(lambda asked: None) as stub:
        status, printed, err, sent, card = extract(stub)
    assert (status, sent) == (2, 0) and '$OPENAI_API_KEY' in err and key not in err


def test_a_local_model_without_a_system_role(main, tiny_llm, tmp_path):
    shutil.copytree(tiny_llm, tmp_path / 'llm')
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    template = refuse + "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    for path in (tmp_path / 'llm').glob('*.jinja'):
        path.write_text(template)
    settings = ['--limit', '2', '--max-tokens', '4', '--max-failed', '1', '--out', tmp_path / 'set']
    call = ['extract', 'same_kind', '--local', '--model', tmp_path / 'llm', *settings]
    status, out, err = main(*call)
    card = json.loads((tmp_path / 'set' / 'train.card.json').read_text())
    assert status == 0 and 'System role not supported' in err
    assert 'the instruction before the first question' in card['changed'][0]
    for path in (tmp_path / 'llm').glob('*.jinja'):
        path.write_text("{{ raise_exception('no chat here') }}")
    status, out, err = main(*call, '--split', 'validation')
    assert status == 2 and 'no chat here' in err and '--form completion' in err
