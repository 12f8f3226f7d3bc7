"""Two engines, one loss: equal to the library and to each other; and a student of any family, trained, saved and
asked with plain transformers."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from making import record_of
from small_t5 import own_task, rationale_set, small_t5, small_tokenizer
from tokenizers import processors
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    ByT5Tokenizer,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from dsbs.method import multitask, stack
from dsbs.method.answering import PlainAnswers, batch_by_length, generate, likeliest_labels, next_token_accuracy
from dsbs.method.multitask import RATIONALE_START, Tokenised, collate, step_by_step_loss
from dsbs.method.settings import TrainingConfig
from dsbs.method.stack import StackedAnswers, StackedEngine
from dsbs.method.student import make_student
from dsbs.method.training import PlainEngine, Trainee, fit
from dsbs.records import DRIFT, EARLY, TOLERANCE, UsageError, is_near
from dsbs.runs.specs import RunSpec

pytestmark = pytest.mark.numeric

SHAPE = dict(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0.0)
START = dict(decoder_start_token_id=0)
BART = dict(
    d_model=32,
    encoder_layers=2,
    decoder_layers=1,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    dropout=0.0,
)
GEMMA = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)


def t5gemma():
    config = T5GemmaConfig(encoder=GEMMA, decoder=GEMMA, vocab_size=96, dropout_rate=0.0)
    config.decoder_start_token_id = config.decoder.bos_token_id
    return T5GemmaForConditionalGeneration(config)


def t5(**form):
    made = T5ForConditionalGeneration(T5Config(**SHAPE, **START, **form))
    if form.get('tie_word_embeddings') is False:
        made.lm_head.weight = torch.nn.Parameter(made.lm_head.weight.detach().clone())
    return made


def bart(**more):
    made = BartForConditionalGeneration(BartConfig(vocab_size=96, **BART, **more))
    with torch.no_grad():
        made.final_logits_bias.copy_(torch.randn(1, 96))  # which a checkpoint may have
    return made


FAMILIES = {
    't5 1.0': lambda: t5(feed_forward_proj='relu'),
    't5 1.1': lambda: t5(feed_forward_proj='gated-gelu'),
    't5 untied': lambda: t5(feed_forward_proj='gated-gelu', tie_word_embeddings=False),
    'mt5': lambda: MT5ForConditionalGeneration(MT5Config(**SHAPE, **START)),
    'umt5': lambda: UMT5ForConditionalGeneration(UMT5Config(**SHAPE, **START)),
    'bart': bart,
    't5gemma': t5gemma,
}
T5S = ('t5 1.0', 't5 1.1', 't5 untied')


def student(family):
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def rows(shared=False):
    "Examples of uneven lengths, some without a rationale; their tokens mean nothing."
    word = lambda *place: 5 + sum((7, 13, 29)[k] * p for k, p in enumerate(place)) % 90
    made = []
    for i in range(12):
        read = [word(i, j) for j in range(2 + 5 * i % 7)] + [1]
        why = [word(i, j, 2) for j in range(1 + 7 * i % 9)] + [1] if i % 4 != 1 else []
        other = [] if not why else read if shared else [4, *read]
        made.append(Tokenised(read, [word(i, j, 3) for j in range(1 + i % 3)] + [1], other, why))
    return made


def obvious_loss(model, some, shared):
    "Two forward passes of the library's model, one for each task."
    pad, losses = model.config.pad_token_id, []
    for kind in ('label', 'rationale'):
        pairs = [(getattr(r, f'{kind}_input'), getattr(r, f'{kind}_target')) for r in some]
        pairs = [(x, y) for x, y in pairs if y]
        wide, long = max(len(x) for x, _ in pairs), max(len(y) for _, y in pairs)
        ids = torch.tensor([x + [pad] * (wide - len(x)) for x, _ in pairs])
        mask = torch.tensor([[1] * len(x) + [0] * (wide - len(x)) for x, _ in pairs])
        labels = torch.tensor([y + [-100] * (long - len(y)) for _, y in pairs])
        start = RATIONALE_START if shared and kind == 'rationale' else model.config.decoder_start_token_id
        written = torch.cat([torch.full((len(pairs), 1), start), labels[:, :-1]], 1)
        written = written.masked_fill(written == -100, pad)
        losses.append(model(ids, mask, decoder_input_ids=written, labels=labels).loss)
    return losses


@pytest.mark.parametrize('shared', [False, True], ids=['named at the encoder', 'named at the decoder'])
@pytest.mark.parametrize('family', FAMILIES)
def test_the_loss_is_that_of_two_forward_passes(family, shared):
    model, some = student(family), rows(shared)
    batch = collate(some, model.config.pad_token_id)
    assert len(batch.input_ids) == (12 if shared else 21)
    found = step_by_step_loss(model, batch, rationale_weight=0.5)
    label, rationale = obvious_loss(model, some, shared)
    for ours, theirs in zip(
        (found['label_loss'], found['rationale_loss'], found['loss']),
        (label, rationale, label + 0.5 * rationale),
        strict=True,
    ):
        assert is_near(ours.item(), theirs.item(), TOLERANCE['float32'])


def loss_and_gradient(engine, family, some, parts=1, **form):
    "Of rows, in one batch or as the sum of several that share its token counts."
    model = student(family)
    made = engine([model], **dict(rationale_weight=0.7) | form)
    batches = [made.collate([some[i::parts]]) for i in range(parts)]
    totals, losses = sum(batch.token_counts() for batch in batches), {}
    for batch in batches:
        found = made(batch, totals)
        found['loss'].sum().backward()
        losses = {name: losses.get(name, 0) + loss.detach() for name, loss in found.items()}
    gradient = made.weights(model, lambda p: p.grad)
    return {name: loss.item() for name, loss in losses.items()}, gradient


@pytest.mark.parametrize('form', ['paper', 'authors'])
@pytest.mark.parametrize('shared', [False, True], ids=['named at the encoder', 'named at the decoder'])
@pytest.mark.parametrize('family', T5S)
def test_both_engines_have_the_same_losses_and_gradients(family, shared, form):
    both_the_same(*(loss_and_gradient(e, family, rows(shared), loss_form=form) for e in (PlainEngine, StackedEngine)))


@pytest.mark.parametrize('shared', [False, True], ids=['named at the encoder', 'named at the decoder'])
@pytest.mark.parametrize('logits', [multitask.LOGITS, 1], ids=['at once', 'example by example'])
@pytest.mark.parametrize('family', T5S)
def test_both_engines_share_the_same_between_the_tasks(family, logits, shared, monkeypatch):
    engines, form = (PlainEngine, StackedEngine), dict(mutual_information=0.3)
    whole = loss_and_gradient(PlainEngine, family, rows(shared), **form)
    monkeypatch.setattr(multitask, 'LOGITS', logits)
    monkeypatch.setattr(stack, 'LOGITS', logits)
    for parts in (1, 4):
        for engine in engines:
            both_the_same(whole, loss_and_gradient(engine, family, rows(shared), parts, **form))
    without = loss_and_gradient(PlainEngine, family, rows(shared))[0]
    found = whole[0]
    assert set(found) - set(without) == {'mutual_information_loss'}
    assert is_near(found['loss'], without['loss'] + 0.3 * found['mutual_information_loss'])


def test_what_is_shared_does_not_depend_on_pieces_that_others_of_a_stack_have():
    shape = SHAPE | START | dict(num_layers=1)
    pair = [T5ForConditionalGeneration(T5Config(**shape | dict(vocab_size=size))).eval() for size in (96, 104)]
    alone, some = copy.deepcopy(pair), rows()
    both = StackedEngine(pair, mutual_information=0.3)
    found = both(both.collate([some, some]))
    for k, one in enumerate(alone):
        plain = PlainEngine([one], mutual_information=0.3)
        theirs = plain(plain.collate([some]))
        assert all(is_near(found[name][k].item(), loss.item()) for name, loss in theirs.items())


def test_the_label_is_not_pulled_towards_the_rationale():
    "Only what decides the rationale's tokens has a gradient of the shared part."
    model, batch = student('t5 1.1'), collate(rows(True), 0)
    of_labels = torch.randn(len(batch.label_targets), batch.label_targets.shape[1], model.config.d_model)
    of_rationales = torch.randn(len(batch.explained), batch.rationale_targets.shape[1], model.config.d_model)
    for vectors in (of_labels, of_rationales):
        vectors.requires_grad_()
    multitask.shared_tokens_loss(model, batch, of_labels, of_rationales).backward()
    assert of_labels.grad is None and of_rationales.grad.abs().sum() > 0


def both_the_same(one, other):
    (plain, a), (stacked, b) = one, other
    assert plain.keys() == stacked.keys() and all(is_near(plain[n], stacked[n]) for n in plain)
    norms = [sum(g.square().sum() for g in gradient.values()).sqrt().item() for gradient in (a, b)]
    assert a.keys() == b.keys() and is_near(*norms)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('shared', [False, True], ids=['named at the encoder', 'named at the decoder'])
@pytest.mark.parametrize('engine', [PlainEngine, StackedEngine])
def test_micro_batches_add_up_to_the_whole_batch_in_either_engine(engine, shared):
    "Rows 1, 5 and 9 have no rationale, so one of four micro-batches has none."
    parts = loss_and_gradient(engine, 't5 1.1', rows(shared), parts=4)
    both_the_same(loss_and_gradient(PlainEngine, 't5 1.1', rows(shared)), parts)


def test_both_engines_have_the_same_loss_without_rationales():
    some = [Tokenised(row.label_input, row.label_target, [], []) for row in rows()]
    plain, stacked = (loss_and_gradient(e, 't5 1.1', some) for e in (PlainEngine, StackedEngine))
    assert list(plain[0]) == ['loss', 'label_loss']
    both_the_same(plain, stacked)


@pytest.mark.parametrize('largest', [1e-3, 1e6], ids=['shortened', 'left alone'])
def test_each_student_of_a_stack_is_clipped_as_alone(largest):
    models = [student('t5 1.0'), student('t5 1.0')]
    with torch.no_grad():
        models[1].shared.weight.mul_(0.5)
    alone = [copy.deepcopy(model) for model in models]
    both = StackedEngine(models)
    both(both.collate([rows(), rows()[::-1]]))['loss'].sum().backward()
    both.clip(largest)
    for model, one, some in zip(models, alone, (rows(), rows()[::-1]), strict=True):
        plain = PlainEngine([one])
        plain(plain.collate([some]))['loss'].sum().backward()
        plain.clip(largest)
        found = both.weights(model, lambda p: p.grad)
        for name, p in one.named_parameters():
            torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-6 * max(1, min(largest, 1)))


@pytest.mark.parametrize(
    'change',
    [
        {},
        dict(accumulation=3),
        dict(gradient_checkpointing=True),
        dict(schedule='constant', dtype='bfloat16'),
    ],
    ids=str,
)
def test_both_engines_make_the_same_twelve_updates(change):
    config = replace(TrainingConfig(max_steps=12, eval_every=12, batch_size=6, learning_rate=1e-3), **change)
    found = []
    for engine in (PlainEngine, StackedEngine):
        model = student('t5 1.1')
        (result,) = fit(engine([model]), [Trainee(rows(), lambda: 0.0)], config)
        found.append((result.history, torch.cat([p.detach().flatten() for p in model.parameters()])))
    (plain, a), (stacked, b) = found
    tolerance = max(DRIFT, TOLERANCE[config.dtype])
    for one, other in list(zip(plain, stacked, strict=True))[:EARLY]:
        assert one.keys() == other.keys() and all(is_near(one[n], other[n], tolerance) for n in one), (one, other)
    assert (a - b).abs().max() <= 12 * 2 * config.learning_rate and plain[-1]['loss'] < plain[0]['loss']
    if config.dtype == 'float32':
        assert (a - b).norm() <= 1e-3 * a.norm()


@pytest.mark.parametrize('family', T5S)
def test_both_engines_give_the_same_answers(family):
    model, ids = student(family), [r.label_input for r in rows()]
    tokenizer = small_tokenizer()
    batches = batch_by_length(ids, 0, batch_tokens=20)
    plain, stacked = PlainAnswers(model), StackedAnswers(model)
    for start in (None, RATIONALE_START):
        assert generate(plain, tokenizer, batches, 6, start) == generate(stacked, tokenizer, batches, 6, start)
    assert likeliest_labels(plain, tokenizer, batches, ['low', 'high', 'my card']) == likeliest_labels(
        stacked, tokenizer, batches, ['low', 'high', 'my card']
    )
    targets = [r.label_target for r in rows()]
    assert next_token_accuracy(plain, batches, targets) == next_token_accuracy(stacked, batches, targets)


def test_an_answer_that_ends_is_padded_in_either_engine():
    "The end token is made likely for some rows, so they end while others go on."
    model, ended = student('t5 untied'), []
    (batch,) = batch_by_length([r.label_input for r in rows()], 0)
    first = torch.zeros(len(batch.ids), 1, dtype=torch.long)
    with torch.no_grad():
        hidden = model(batch.ids, batch.mask, decoder_input_ids=first, output_hidden_states=True)
        hidden = hidden.decoder_hidden_states[-1][:, 0]
        model.lm_head.weight[1] = 10 * (hidden[0] - hidden.mean(0))
        for asked in (PlainAnswers(model), StackedAnswers(model)):
            ended.append(asked.answer(asked.encode(batch.ids, batch.mask), batch.mask, 5).tolist())
    plain, stacked = ended
    assert plain == stacked and [1, 0, 0, 0, 0] in plain and any(1 not in ids for ids in plain), plain


def test_a_run_through_either_engine():
    spec = RunSpec(student='scratch-32x1', n_train=40, max_steps=8, eval_every=4, batch_size=8, dropout=0.0)
    stacked, plain = (record_of(replace(spec, engine=engine, learning_rate=1e-3)) for engine in ('auto', 'plain'))
    assert (stacked['provenance']['engine'], plain['provenance']['engine']) == ('stack', 'plain')
    assert stacked['key'] != plain['key'] and stacked['metrics'].keys() == plain['metrics'].keys()
    for a, b in zip(stacked['history'], plain['history'], strict=True):
        assert all(is_near(a[name], b[name], DRIFT) for name in a)


def bart_tokenizer():
    "As BART's: padding is 1, the end 2, and a token stands in front of a text."
    made = small_tokenizer(first=('<s>', '<pad>', '</s>', '<unk>'))
    ends = dict(single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 2)])
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(**ends)
    names = dict(bos_token='<s>', pad_token='<pad>', eos_token='</s>', unk_token='<unk>')
    return PreTrainedTokenizerFast(tokenizer_object=made.backend_tokenizer, **names)


def saved(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def family_folder(kind, folder):
    torch.manual_seed(0)
    few = SHAPE | dict(vocab_size=len(small_tokenizer()))
    if kind == 't5':
        small_t5(folder)
    elif kind == 'byt5':
        small_t5(folder, ByT5Tokenizer(), vocab_size=384, num_decoder_layers=1)
    elif kind == 'mt5':
        saved(folder, MT5ForConditionalGeneration(MT5Config(**few, **START)), small_tokenizer())
    elif kind == 'umt5':
        saved(folder, UMT5ForConditionalGeneration(UMT5Config(**few, **START)), small_tokenizer())
    else:
        tokenizer = bart_tokenizer()
        config = BartConfig(vocab_size=len(tokenizer), **BART, forced_bos_token_id=0)
        model = BartForConditionalGeneration(config)
        assert (config.pad_token_id, config.eos_token_id, config.decoder_start_token_id) == (1, 2, 2)
        model.generation_config.update(forced_bos_token_id=0, forced_eos_token_id=2, num_beams=4, min_length=9)
        saved(folder, model, tokenizer)
    return folder


@pytest.mark.parametrize('kind', ['t5', 'mt5', 'umt5', 'byt5', 'bart'])
def test_a_folder_of_any_family_is_trained_saved_and_asked_with_plain_transformers(kind, tmp_path, main):
    own_task(tmp_path / 'task')
    family_folder(kind, tmp_path / 'student')
    settings = ['method=standard', 'dropout=0', 'learning_rate=5e-3', 'max_steps=60', 'eval_every=30', 'batch_size=16']
    call = ['run', f'task={tmp_path / "task"}', f'student={tmp_path / "student"}', *settings, 'schedule=constant']
    status, out, err = main(*call, '--save', tmp_path / 'saved', '--json')
    assert status == 0, err
    record = json.loads(out)
    assert record['provenance']['engine'] == 'plain' and record['metrics']['test_accuracy'] >= 75, record['metrics']
    assert record['history'][-1]['loss'] < record['history'][0]['loss'] / 2
    was, now = (json.loads((tmp_path / f / 'config.json').read_text()) for f in ('student', 'saved'))
    assert now['model_type'] == was['model_type'] and now['architectures'] == was['architectures']
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / 'saved')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'saved')
    from dsbs.runs.run import questions
    from dsbs.runs.specs import make_spec, prepare

    spec = make_spec(dict(t.split('=', 1) for t in call[1:]))
    asked = questions(prepare(spec), tokenizer, 'test')[: len(record['answers'])]
    said = [
        tokenizer.decode(model.generate(**tokenizer(text, return_tensors='pt'))[0], skip_special_tokens=True)
        for text in asked
    ]
    assert said == list(record['answers'].values()) and set(said) <= {'low', 'high'}


def test_the_stack_trains_a_t5_folder_and_no_other(tmp_path, main):
    own_task(tmp_path / 'task')
    for kind, status in (('t5', 0), ('bart', 2)):
        family_folder(kind, tmp_path / kind)
        call = ['run', f'task={tmp_path / "task"}', 'method=standard', f'student={tmp_path / kind}', 'engine=stack']
        found, out, err = main(*call, 'max_steps=2', 'eval_every=1', 'batch_size=8', '--json')
        assert found == status, err
    assert 'engine=stack trains a T5, and this is a bart: use engine=plain' in err
    assert err.count('dsbs: ') == 1


def test_what_the_engines_refuse(tmp_path, main, monkeypatch):
    rationale_set(tmp_path / 'set', own_task(tmp_path / 'task'))
    family_folder('bart', tmp_path / 'bart')
    call = ['run', f'task={tmp_path / "task"}', f'student={tmp_path / "bart"}', f'teacher={tmp_path / "set"}']
    settings = json.loads((tmp_path / 'bart' / 'config.json').read_text())
    status, _, err = main(*call, 'max_steps=1', 'task_prefix=decoder')
    assert status == 2 and 'use task_prefix=encoder' in err, err
    with pytest.raises(UsageError, match='unknown engine'):
        RunSpec(engine='fast')
    monkeypatch.setenv('WORLD_SIZE', '2')
    from dsbs.runs.run import engine_kind

    with pytest.raises(UsageError, match='engine=stack trains in one process'):
        engine_kind(RunSpec(engine='stack'))
    assert engine_kind(RunSpec()) == 'plain' and settings['model_type'] == 'bart'


def test_more_tokens_than_positions(tmp_path, main):
    own_task(tmp_path / 'task', text='{word} income of order {i} the parcel was charged twice')
    tokenizer = bart_tokenizer()
    config = BartConfig(vocab_size=len(tokenizer), **BART, max_position_embeddings=8)
    saved(tmp_path / 'bart', BartForConditionalGeneration(config), tokenizer)
    call = ['run', f'task={tmp_path / "task"}', 'method=standard', f'student={tmp_path / "bart"}', 'max_steps=1']
    status, _, err = main(*call)
    assert status == 2 and 'has 8 positions: set max_input=8' in err
    status, _, err = main(*call, 'max_input=8', 'batch_size=8')
    assert status == 0, err


def test_a_bart_folder_keeps_its_start_and_forgets_its_habits(tmp_path):
    model, tokenizer = make_student(str(family_folder('bart', tmp_path / 'bart')), dropout=0.2)
    assert (model.config.decoder_start_token_id, model.config.dropout, tokenizer.pad_token_id) == (2, 0.2, 1)
    kept = model.generation_config
    assert (kept.num_beams, kept.forced_bos_token_id, kept.min_length) in ((None, None, None), (1, None, 0))
