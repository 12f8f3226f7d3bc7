"A student that is exported answers as before, or is not exported; and whoever asks it gets an answer a line."

import io
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from small_t5 import own_task, rationale_set, small_t5, small_tokenizer
from tokenizers import processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    ByT5Tokenizer,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5ForConditionalGeneration,
)
from upload_hub import OID, Hub

from dsbs.data.tasks import load_task
from dsbs.records import UsageError, WorkFailed
from dsbs.runs.saved import run_and_save
from dsbs.runs.specs import make_spec
from dsbs.teacher.prompts import prompt_of
from dsbs.teacher.sets import write_set
from dsbs.tools.serving import ConvertedStudent, ExportSettings, TorchStudent, export, open_student

QUICK = dict(
    method='standard', max_steps=60, eval_every=30, batch_size=16, learning_rate=5e-3, dropout=0.0, schedule='constant'
)
SHAPE = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
ASKED = ['low income of order 3', 'high income of order 4', 'order of 5 income: low', 'high', 'low </s> <pad> high']


def kept(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def bart(folder):
    "As BART's: padding is 1, the end 2, a token stands in front of a text, and outputs have a bias."
    made = small_tokenizer(first=('<s>', '<pad>', '</s>', '<unk>')).backend_tokenizer
    ends = dict(single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 2)])
    made.post_processor = processors.TemplateProcessing(**ends)
    names = dict(bos_token='<s>', pad_token='<pad>', eos_token='</s>', unk_token='<unk>')
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **names)
    layers = {f'{side}_{what}': n for side in ('encoder', 'decoder') for what, n in dict(layers=2, ffn_dim=64).items()}
    heads = dict(encoder_attention_heads=4, decoder_attention_heads=4)
    model = BartForConditionalGeneration(BartConfig(vocab_size=len(tokenizer), d_model=32, **layers, **heads))
    with torch.no_grad():
        model.final_logits_bias.copy_(torch.randn(1, len(tokenizer)))
    return kept(folder, model, tokenizer)


def family(kind, folder):
    torch.manual_seed(0)
    few = SHAPE | dict(vocab_size=len(small_tokenizer()))
    if kind == 'byt5':
        return small_t5(folder, ByT5Tokenizer(), vocab_size=384)
    if kind == 'mt5':
        return kept(folder, MT5ForConditionalGeneration(MT5Config(**few)), small_tokenizer())
    if kind == 'umt5':
        return kept(folder, UMT5ForConditionalGeneration(UMT5Config(**few)), small_tokenizer())
    if kind == 'bart':
        return bart(folder)
    form = dict(feed_forward_proj='relu') if kind == 't5 relu' else {}
    more = dict(tie_word_embeddings=False, scale_decoder_outputs=False) if kind == 't5 untied' else {}
    return small_t5(folder, vocab_size=len(small_tokenizer()) + (20 if kind == 't5 padded' else 0), **form, **more)


def student(tmp_path, **settings):
    "A kept student of a small task of one's own."
    rows = own_task(tmp_path / 'task', n=240)
    rationale_set(tmp_path / 'set', rows)
    where = dict(task=str(tmp_path / 'task'), teacher=str(tmp_path / 'set'))
    run_and_save(make_spec(QUICK | where | settings), tmp_path / 'saved')
    return tmp_path / 'saved'


@pytest.fixture(scope='module')
def scratch(tmp_path_factory):
    return student(tmp_path_factory.mktemp('scratch'), student='scratch-32x1')


@pytest.fixture(scope='module')
def exported(scratch):
    export(scratch, scratch.parent / 'exported')
    return scratch.parent / 'exported'


KINDS = ['t5', 't5 relu', 't5 untied', 't5 padded', 'mt5', 'umt5', 'byt5', 'bart']


@pytest.mark.numeric
@pytest.mark.parametrize('kind', KINDS)
def test_every_family_answers_as_before(kind, tmp_path):
    saved = student(tmp_path, student=str(family(kind, tmp_path / 'first')))
    card = export(saved, tmp_path / 'out')
    assert card['agreement'] == 100.0 and card['accuracy'] == card['accuracy_torch'] and card['n'] >= 20
    assert card['accuracy'] >= 75, card
    assert open_student(tmp_path / 'out').answers(ASKED) == TorchStudent(saved).answers(ASKED)


WAYS = {
    'standard': {},
    'a rationale, then the label': dict(method='single_task'),
    'the label, then a rationale': dict(method='answer_first'),
    'two tasks': dict(method='step_by_step'),
    'named at the decoder': dict(method='step_by_step', task_prefix='decoder'),
    'a rationale in the input': dict(method='rationale_as_input'),
    'without a prefix': dict(prefix_style='authors'),
    'inputs cut': dict(max_input=4),
}


@pytest.mark.numeric
@pytest.mark.parametrize('way', WAYS)
def test_every_way_to_learn_answers_as_before(way, tmp_path):
    saved = student(tmp_path, student='scratch-32x1', **WAYS[way])
    card = export(saved, tmp_path / 'out')
    record = json.loads((saved / 'record.json').read_text())
    assert card['agreement'] == 100.0 and card['accuracy'] == record['metrics']['test_accuracy'] > 0
    assert open_student(tmp_path / 'out').answers(ASKED) == TorchStudent(saved).answers(ASKED)
    assert not any('So the answer' in said or 'The reason' in said for said in open_student(saved).answers(ASKED))


def test_eight_bits_are_smaller_and_say_how_they_answer(scratch, exported):
    card = export(scratch, scratch.parent / 'int8', ExportSettings('int8', tolerance=0.2))
    assert card['agreement'] >= 80 and card['quantize'] == 'int8'
    weights = [(folder / 'model.bin').stat().st_size for folder in (scratch.parent / 'int8', exported)]
    assert weights[0] < weights[1] / 2
    assert '| kind of weights | float32 | int8 |' in (scratch.parent / 'int8' / 'README.md').read_text()


def test_the_card_has_what_a_hub_reads_and_no_place_of_this_machine(exported):
    card = (exported / 'README.md').read_text()
    assert card.startswith('---\n') and 'library_name: ctranslate2' in card and 'model-index:' in card
    assert str(exported.parent) not in card
    assert json.loads((exported / 'serving.json').read_text())['export']['agreement'] == 100.0


def test_what_answers_otherwise_is_not_written(scratch, tmp_path, monkeypatch):
    monkeypatch.setattr(ConvertedStudent, 'answers', lambda self, inputs: ['low'] * len(inputs))
    with pytest.raises(WorkFailed, match=r"of 2\d .* such as 'low' and not 'high' to 'high income"):
        export(scratch, tmp_path / 'a' / 'out', ExportSettings(tolerance=0.1))
    assert not list((tmp_path / 'a').iterdir())
    export(scratch, tmp_path / 'a' / 'out', ExportSettings(tolerance=1.0))


def test_a_wrong_export_is_one_line(scratch, exported, main, tmp_path):
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'mine.txt').write_text('mine')
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'record.json').write_text('{"spec": 3}')
    out, wrong = tmp_path / 'out', tmp_path / 'broken'
    for call, words in [
        ((scratch, '--to', 'ctranslate2', tmp_path / 'full'), 'there is something already'),
        ((scratch, '--to', 'onnx', out), "unknown format 'onnx': choose one of ctranslate2"),
        ((scratch, '--to', 'ctranslate2', out, '--quantize', 'int2'), "'int2': choose one of float32, int8"),
        ((scratch, '--to', 'ctranslate2', out, '--tolerance', '7'), 'should be a share from 0 to 1'),
        ((scratch, '--to', 'ctranslate2', out, '--task', 'sudoku'), "unknown task 'sudoku'"),
        ((scratch, '--to', 'ctranslate2'), '--to'),
        ((scratch,), '--to'),
        ((exported, '--to', 'ctranslate2', out), 'is exported already'),
        ((wrong, '--to', 'ctranslate2', out), 'is no record of a run'),
        ((tmp_path / 'nowhere', '--to', 'ctranslate2', out), 'no such folder'),
    ]:
        status, said, err = main('export', *call)
        assert (status, said, err.count('\n')) == (2, '', 1) and words in err, (call, err)
    assert not out.exists() and sorted(p.name for p in tmp_path.iterdir()) == ['broken', 'full']


def test_a_kind_that_cannot_be_converted_says_so(scratch, tmp_path, monkeypatch):
    from ctranslate2.converters import transformers as loaders

    monkeypatch.delitem(loaders._MODEL_LOADERS, 'T5Config')
    with pytest.raises(UsageError, match='cannot convert it .*No conversion is registered'):
        export(scratch, tmp_path / 'out')
    assert not list(tmp_path.iterdir())


def test_a_moved_task_is_named(scratch, tmp_path, main):
    rows = own_task(tmp_path / 'elsewhere', n=240)
    record = json.loads((scratch / 'record.json').read_text())
    moved = tmp_path / 'moved'
    shutil.copytree(scratch, moved)
    record['spec']['task'] = str(tmp_path / 'gone')
    (moved / 'record.json').write_text(json.dumps(record))
    call = ('export', moved, '--to', 'ctranslate2', tmp_path / 'out')
    status, _, err = main(*call)
    assert status == 2 and 'name the task with --task' in err and err.count('\n') == 1
    status, out, err = main(*call, '--task', tmp_path / 'elsewhere', '--limit', '7', '--json')
    card = json.loads(out)
    assert (status, card['n'], card['agreement']) == (0, 7, 100.0) and len(rows) == 240


def typed(monkeypatch, text):
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(text), encoding='utf-8'))


def test_answers_come_a_line_each_or_as_json(scratch, exported, main, monkeypatch):
    for folder in (scratch, exported):
        assert main('ask', folder, ASKED[0], ASKED[1]) == (0, 'low\nhigh\n', '')
        typed(monkeypatch, b'low income of order 3\r\nhigh\n\nlow')
        status, out, err = main('ask', folder)
        assert (status, err, out.splitlines()[:2], len(out.splitlines())) == (0, '', ['low', 'high'], 4)
        typed(monkeypatch, 'low income of order 3\nhigh ünd \N{SNOWMAN}'.encode())
        said = json.loads(main('ask', folder, '--json', '--batch', '1')[1])
        assert [list(pair) for pair in said] == [['input', 'answer']] * 2
        assert said[0] == dict(input='low income of order 3', answer='low')


def test_inputs_that_lose_their_end_are_counted(scratch, exported, main):
    long = ' '.join(['low income of order 3'] * 400)
    for folder in (scratch, exported):
        status, out, err = main('ask', folder, long, 'high', long)
        assert (status, len(out.splitlines())) == (0, 3)
        assert err == 'dsbs: 2 inputs were longer than 1024 tokens and lost their end\n'


def test_an_export_within_the_students_folder_is_asked(scratch, tmp_path):
    shutil.copytree(scratch, tmp_path / 'both')
    assert isinstance(open_student(tmp_path / 'both'), TorchStudent)
    export(tmp_path / 'both', tmp_path / 'both' / 'ctranslate2')
    assert isinstance(open_student(tmp_path / 'both'), ConvertedStudent)
    assert isinstance(TorchStudent(tmp_path / 'both'), TorchStudent)


def test_wrong_questions_are_one_line(scratch, exported, main, monkeypatch, tmp_path):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'half').mkdir()
    (tmp_path / 'half' / 'serving.json').write_text('{}')
    for call, text, words in [
        ((exported,), b'', 'there is nothing to answer'),
        ((exported,), b'\xff\xfe', 'is not UTF-8'),
        ((tmp_path / 'empty', 'x'), b'', 'holds no student (no record.json)'),
        ((tmp_path / 'half', 'x'), b'', 'is no exported student'),
        ((tmp_path / 'nowhere', 'x'), b'', 'no such folder'),
        ((exported, 'x', '--batch', 'many'), b'', 'not a whole number'),
        ((exported, 'x', '--batch', '0'), b'', '--batch 0: should be at least 1'),
    ]:
        typed(monkeypatch, text)
        status, out, err = main('ask', *call)
        assert (status, out, err.count('\n')) == (2, '', 1) and words in err, (call, err)


def test_an_answer_comes_before_the_next_question_is_asked(exported):
    "A process that asks only after the answer before."
    command = [Path(sys.executable).parent / 'dsbs', 'ask', exported, '--batch', '1']
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as answering:
        for word in ('low', 'high', 'low'):
            answering.stdin.write(f'{word} income of order 3\n')
            answering.stdin.flush()
            assert answering.stdout.readline() == f'{word}\n'
        answering.stdin.close()
        assert answering.wait() == 0


def test_an_export_is_asked_without_torch(exported):
    code = f"""
import sys
from dsbs.tools.cli import main
status = main(['ask', {str(exported)!r}, 'low income of order 3'])
assert status == 0 and not {{'torch', 'transformers', 'pandas', 'datasets'}} & sys.modules.keys()
"""
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == 'low\n'


def test_several_threads_ask_one_export(exported):
    asked = open_student(exported, threads=1)
    inputs = [f'{("low", "high")[i % 2]} income of order {i}' for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda text: asked.answers([text])[0], inputs))
    assert said == asked.answers(inputs) and set(said) == {'low', 'high'}


TOKEN = 'hf_secretsecretsecretsecret'


@pytest.fixture
def hub(monkeypatch):
    with Hub(TOKEN) as there:
        monkeypatch.setenv('HF_ENDPOINT', there.url)
        monkeypatch.setenv('HF_TOKEN', TOKEN)
        yield there


def test_a_student_and_an_export_are_pushed_whole(hub, scratch, exported, main):
    for folder, private in ((scratch, False), (exported, True)):
        status, out, err = main('push', folder, 'me/levels', '--json', *(['--private'] if private else []))
        made = json.loads(out)
        assert status == 0 and TOKEN not in out + err
        assert made | dict(url='') == dict(folder=str(folder), name='me/levels', kind='model', url='', commit=OID)
        assert made['url'] == f'{hub.url}/me/levels'
        for path in folder.iterdir():
            assert hub.files[path.name] == path.read_bytes(), path
    assert hub.repos == {'me/levels': ('model', 'private')}
    assert yaml.safe_load(hub.files['README.md'].decode().split('---')[1])['library_name'] == 'ctranslate2'


def test_a_rationale_set_is_pushed_as_a_data_set(hub, main, tmp_path):
    task = load_task('same_kind')
    rows = [r | dict(rationale='Both.', votes=1, others=[]) for r in task['train'].to_list()[:3]]
    card = dict(task='same_kind', model='a [model]', split='train', rows=3, failed=0, tokens=90)
    card |= dict(quality=dict(labeled=3, correct=2, accuracy=66.67))
    (tmp_path / 'set').mkdir()
    write_set(tmp_path / 'set', rows, [], prompt_of(task), card)
    status, out, err = main('push', tmp_path / 'set', 'rationales')
    assert status == 0 and 'is dataset somebody/rationales' in out, err
    assert hub.repos == {'somebody/rationales': ('dataset', None)} and 'train.jsonl' in hub.files
    front, text = hub.files['README.md'].decode().split('---\n')[1:]
    facts = yaml.safe_load(front)
    assert (facts['license'], facts['language']) == ('apache-2.0', 'en')
    assert facts['configs'][0]['data_files'] == [dict(split='train', path='train.jsonl')]
    assert r'a \[model\]' in text and '66.67 [20.77, 93.85], n = 3' in text


def test_a_card_of_ones_own_stays(tmp_path):
    task = load_task('same_kind')
    (tmp_path / 'README.md').write_text('Mine.')
    write_set(tmp_path, [], [], prompt_of(task), dict(task='same_kind', model='m', split='train'))
    assert (tmp_path / 'README.md').read_text() == 'Mine.'


def test_what_a_hub_reads_of_a_student(scratch):
    front = yaml.safe_load((scratch / 'README.md').read_text().split('---\n')[1])
    record = json.loads((scratch / 'record.json').read_text())
    known = front['model-index'][0]['results'][0]['metrics'][0]
    low, high = known['args']['interval_95']
    assert known['value'] == record['metrics']['test_accuracy'] and low <= known['value'] <= high
    assert known['args']['n'] == record['metrics']['n_test'] and front['license'] == 'unknown'
    assert 'language' not in front and 'datasets' not in front and 'base_model' not in front


def test_a_refused_push_is_one_line_without_the_token(hub, scratch, main, monkeypatch, tmp_path):
    def one_line(status, *words):
        found, out, err = main('push', *call)
        assert (found, out, err.count('\n')) == (status, '', 1) and TOKEN not in err, err
        assert all(word in err for word in words), err

    call = (scratch, 'me/levels')
    hub.status = 403
    one_line(1, hub.url, 'did not take me/levels')
    hub.token = 'another'
    one_line(1, 'did not take me/levels', '401')
    monkeypatch.setenv('HF_TOKEN', '')
    monkeypatch.setattr('huggingface_hub.get_token', lambda: None)
    one_line(2, 'there is no token for the hub', '$HF_TOKEN')
    call = (tmp_path / 'nowhere', 'me/levels')
    one_line(2, 'no such folder')
    call = (tmp_path, 'me/levels')
    one_line(2, 'has no README.md with the lines that a hub reads')
    (tmp_path / 'README.md').write_text('---\nlicense: mit\n---\n')
    one_line(2, 'is neither a student nor a rationale set')
    assert not any(TOKEN in str(p.read_bytes()) for p in scratch.iterdir())


def test_a_hub_that_is_not_there_is_one_line(scratch, main, monkeypatch):
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:1')
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    status, out, err = main('push', scratch, 'me/levels')
    assert (status, out, err.count('\n')) == (1, '', 1) and 'did not take me/levels' in err
