"A pretrained student whose parts do not fit: one line each, before anything is trained."

import json
import shutil

import pytest
import torch
from small_t5 import change, own_task, small_t5, small_tokenizer, weights
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    ByT5Tokenizer,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from dsbs.data.examples import Example
from dsbs.hub import PINS
from dsbs.method.student import make_student
from dsbs.method.views import make_views
from dsbs.records import UsageError
from dsbs.runs.specs import RunSpec
from dsbs.runs.tokens import tokens_key

FEW = dict(
    d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj='gated-gelu', decoder_start_token_id=0
)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    return small_t5(tmp_path_factory.mktemp('whole') / 'student')


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / 'student')


def other(kind, config, **more):
    return lambda f: kind(config(vocab_size=len(small_tokenizer()), **more)).save_pretrained(f)


def tokenizer(**how):
    return lambda f: (clear(f), small_tokenizer(**how).save_pretrained(f))


def clear(f):
    [p.unlink() for p in f.glob('token*')]


def config(**settings):
    return lambda f: change(f / 'config.json', **settings)


def only_forms(**settings):  # as a config.json from before the library wrote what follows from `feed_forward_proj`
    def work(f):
        found = {
            k: v
            for k, v in json.loads((f / 'config.json').read_text()).items()
            if k not in ('dense_act_fn', 'is_gated_act')
        }
        (f / 'config.json').write_text(json.dumps(found | settings))

    return work


def written(name, data):
    return lambda f: (f / name).write_bytes(data)


def moved(f):
    [(clear(f), (f / 'spiece.model').write_bytes(b'not a model'))]


def bos(f):
    clear(f)
    made = small_tokenizer()
    from tokenizers import processors

    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single='<unk> $A </s>', special_tokens=[('<unk>', 2), ('</s>', 1)]
    )
    made.save_pretrained(f)


def shards(f, spoil):
    T5ForConditionalGeneration.from_pretrained(f).save_pretrained(f, max_shard_size='20KB')
    (f / 'model.safetensors').unlink(missing_ok=True)
    spoil(sorted(f.glob('model-*.safetensors')))


def empty_shard(parts):
    from safetensors.torch import save_file

    save_file({}, parts[1], metadata=dict(format='pt'))


UNFIT = {  # what is spoilt: how, and what the line says
    'bart': (
        other(
            BartForConditionalGeneration,
            BartConfig,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
        ),
        'padding is 0 in its tokenizer and 1 in its config.json',
    ),
    'an mt5 that should be a umt5': (
        lambda f: (
            other(MT5ForConditionalGeneration, MT5Config, **FEW)(f),
            change(f / 'config.json', model_type='umt5', architectures=['UMT5ForConditionalGeneration']),
        ),
        'layer.0.SelfAttention.relative_attention_bias.weight is missing',
    ),
    'a umt5 that should be a t5': (
        lambda f: (
            other(UMT5ForConditionalGeneration, UMT5Config, **FEW)(f),
            change(f / 'config.json', model_type='t5', architectures=['T5ForConditionalGeneration']),
        ),
        'relative_attention_bias.weight has no place in this model',
    ),
    'a decoder': (config(model_type='llama'), "model_type 'llama', and only t5"),
    'no kind': (config(model_type=None), 'no model_type, and only t5'),
    'an adapter': (written('adapter_config.json', b'{}'), 'merge it with its base model'),
    'quantised': (
        config(quantization_config=dict(quant_method='bitsandbytes', load_in_8bit=True)),
        'its weights are quantised',
    ),
    'an encoder': (
        other(T5EncoderModel, T5Config, **FEW),
        'decoder.block.0.layer.0.SelfAttention.k.weight is missing (and 29 more)',
    ),
    'a layer is missing': (
        lambda f: weights(f, lambda w: [w.pop(n) for n in list(w) if n.startswith('decoder.block.1.')]),
        'decoder.block.1.layer.0.SelfAttention.k.weight is missing',
    ),
    'a layer too many': (config(num_decoder_layers=1), 'decoder.block.1.layer.0.SelfAttention.k.weight has no place'),
    'a head of another task': (
        lambda f: weights(f, lambda w: w.update({'classification_head.dense.weight': torch.zeros(4, 4)})),
        'classification_head.dense.weight has no place',
    ),
    'saved in a wrapper': (
        lambda f: weights(f, lambda w: [w.update({f'module.{n}': w.pop(n)}) for n in list(w)]),
        'is missing',
    ),
    'another width': (config(d_model=64), 'in the file and'),
    'another vocabulary': (
        config(vocab_size=200),
        f'shared.weight is [{len(small_tokenizer())}, 32] in the file and [200, 32] by config.json',
    ),
    'not gated': (config(is_gated_act=False), 'DenseReluDense.wi.weight is missing'),
    'NaN': (
        lambda f: weights(f, lambda w: w['encoder.final_layer_norm.weight'].fill_(float('nan'))),
        'encoder.final_layer_norm.weight holds NaN or infinity',
    ),
    'infinity in half precision': (
        lambda f: weights(f, lambda w: w.update({n: (p * 1e6).half() for n, p in w.items()})),
        'holds NaN or infinity',
    ),
    'a shard is missing': (
        lambda f: shards(f, lambda parts: parts[1].unlink()),
        'names weights that do not lie in the folder',
    ),
    'a shard is empty': (lambda f: shards(f, empty_shard), 'is missing'),
    'cut off': (
        lambda f: (f / 'model.safetensors').write_bytes((f / 'model.safetensors').read_bytes()[:900]),
        '*.safetensors cannot be read',
    ),
    'a pointer to the weights': (
        written('model.safetensors', b'version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n'),
        '*.safetensors cannot be read',
    ),
    'a wrong number of layers': (config(num_layers='two'), 'config.json cannot be read'),
    'an unknown activation': (only_forms(feed_forward_proj='gated-swiglu'), "names 'swiglu'"),
    'an unknown inner activation': (config(dense_act_fn='nope'), "names 'nope'"),
    'settings that are a list': (written('config.json', b'[1]'), 'config.json cannot be read'),
    'no tokenizer': (clear, 'its tokenizer is empty'),
    'only its settings': (lambda f: (f / 'tokenizer.json').unlink(), 'its tokenizer cannot be read'),
    'only its settings, of a T5': (
        lambda f: ((f / 'tokenizer.json').unlink(), change(f / 'tokenizer_config.json', tokenizer_class='T5Tokenizer')),
        'its tokenizer is empty',
    ),
    'a tokenizer that is none': (written('tokenizer.json', b'{"a": 1}'), 'its tokenizer cannot be read'),
    'a broken sentencepiece file': (moved, 'its tokenizer cannot be read'),
    'pieces added': (
        lambda f: (made := small_tokenizer(), made.add_tokens(['<low>', '<high>']), made.save_pretrained(f)),
        f'has {len(small_tokenizer()) + 2} pieces (the last is {len(small_tokenizer()) + 1}), '
        f'and its embeddings are {len(small_tokenizer())}',
    ),
    'padding elsewhere': (
        lambda f: (tokenizer(first=('</s>', '<pad>'))(f), change(f / 'config.json', pad_token_id=1, eos_token_id=0)),
        'padding is 1 in its tokenizer',
    ),
    'padding elsewhere in the settings': (config(pad_token_id=None), 'padding is 0 in its tokenizer and None'),
    'another end': (config(eos_token_id=5), 'the end token is 1 in its tokenizer and 5 in its config.json'),
    'several ends': (config(eos_token_id=[1, 5]), 'the end token is 1 in its tokenizer and [1, 5]'),
    'another start': (config(decoder_start_token_id=5), "T5's decoder starts at 0"),
    'no end': (tokenizer(ends=False), 'does not put the end token (1) after a text'),
    'something in front': (bos, 'puts tokens of its own around a text'),
}


@pytest.mark.parametrize('name', UNFIT)
def test_parts_that_do_not_fit(name, folder, capsys):
    spoil, why = UNFIT[name]
    spoil(folder)
    capsys.readouterr()
    with pytest.raises(UsageError) as e:
        make_student(str(folder))
    said, printed = str(e.value), capsys.readouterr()
    assert why in said and str(folder) in said and '\n' not in said and not printed.out + printed.err


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def aliases(w):
    w.update(
        {
            name: w['shared.weight'].clone()
            for name in ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight', 'lm_head.weight')
        }
    )


FIT = {
    'as it is': lambda f: None,
    'in shards': lambda f: shards(f, lambda parts: None),
    'other names of the embeddings': lambda f: weights(f, aliases),
    'a bias that T5 1.0 has and nobody reads': lambda f: weights(
        f,
        lambda w: w.update(
            {'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight': torch.zeros(32, 4)}
        ),
    ),
    'no head of its own, though it says so': lambda f: change(f / 'config.json', tie_word_embeddings=False),
    'no start': lambda f: change(f / 'config.json', decoder_start_token_id=None),
    'habits of a tokenizer': lambda f: change(
        f / 'tokenizer_config.json',
        truncation_side='left',
        padding_side='left',
        clean_up_tokenization_spaces=True,
        model_max_length=4,
    ),
}


@pytest.mark.parametrize('name', FIT)
def test_parts_that_fit(name, folder, whole):
    FIT[name](folder)
    t5, tokens = make_student(str(folder), dropout=0.0)
    assert same(t5, make_student(str(whole), dropout=0.0)[0]) and t5.config.decoder_start_token_id == 0
    assert (tokens.truncation_side, tokens.padding_side, tokens.clean_up_tokenization_spaces) == (
        'right',
        'right',
        False,
    )


@pytest.mark.parametrize(
    'form',
    [
        dict(feed_forward_proj='relu'),
        dict(num_decoder_layers=1),
        dict(vocab_size=400),
        dict(tie_word_embeddings=False, scale_decoder_outputs=False),
    ],
    ids=str,
)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_all_forms_of_t5_fit(form, dtype, tmp_path):
    small_t5(tmp_path, **form)
    T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype).save_pretrained(tmp_path)
    t5, _ = make_student(str(tmp_path))
    assert {p.dtype for p in t5.parameters()} == {torch.float32}


def test_pieces_added_with_their_embeddings_fit(tmp_path):
    made = small_tokenizer()
    made.add_tokens(['<low>', '<high>'])
    small_t5(tmp_path, made)
    assert len(make_student(str(tmp_path))[1]) == len(small_tokenizer()) + 2


def test_a_byt5_fits_and_its_tokens_have_a_name(tmp_path):
    small_t5(tmp_path, ByT5Tokenizer(), vocab_size=384, num_decoder_layers=1)
    _, tokens = make_student(str(tmp_path))
    view = lambda e: make_views(e, 'standard')
    assert (
        not tokens.is_fast
        and len({tokens_key([Example('1', text, 'yes')], view, tokens) for text in ('正面', '负面', '正面')}) == 2
    )


def test_a_run_ends_in_that_line(folder, tmp_path, main):
    own_task(tmp_path / 'task')
    change(folder / 'config.json', model_type='llama')
    status, out, err = main('run', f'task={tmp_path / "task"}', 'method=standard', f'student={folder}', 'max_steps=1')
    assert status == 2 and not out and len(err.strip().splitlines()) == 1 and "model_type 'llama'" in err
    assert not list((tmp_path / 'runs').rglob('record.json'))


def in_the_cache(folder, tmp_path, monkeypatch, name, commit, ref=''):
    "Put a folder where the hub's cache has a model, and be offline."
    import huggingface_hub.constants

    at = tmp_path / 'cache' / f'models--google--{name}'
    shutil.copytree(folder, at / 'snapshots' / commit)
    if ref:
        (at / 'refs' / ref).parent.mkdir(parents=True, exist_ok=True)
        (at / 'refs' / ref).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)


@pytest.mark.parametrize('name', ['t5-v1_1-base', 'google/t5-v1_1-base'])
def test_pickled_weights_in_the_hubs_cache(folder, tmp_path, monkeypatch, name):
    "The files of google/t5-v1_1-* as the hub has them on its main branch, at the commit that is pinned."
    whole, _ = make_student(str(folder), dropout=0.0)
    (folder / 'model.safetensors').unlink()
    torch.save(whole.state_dict(), folder / 'pytorch_model.bin')
    in_the_cache(folder, tmp_path, monkeypatch, 't5-v1_1-base', PINS['google/t5-v1_1-base'])
    assert same(make_student(name, dropout=0.0)[0], whole)


def test_another_commit_than_the_pinned_one_is_not_taken_for_it(folder, tmp_path, monkeypatch):
    in_the_cache(folder, tmp_path, monkeypatch, 't5-v1_1-base', 40 * 'a', 'main')
    assert make_student('t5-v1_1-base', revision='main')[0].num_parameters()
    with pytest.raises(UsageError, match='is not here and HF_HUB_OFFLINE is set'):
        make_student('t5-v1_1-base')


def test_a_revision_with_safetensors_in_the_cache_is_taken(folder, tmp_path, monkeypatch):
    in_the_cache(folder, tmp_path, monkeypatch, 't5-v1_1-base', 40 * 'b', 'refs/pr/2')
    assert make_student('t5-v1_1-base', revision='refs/pr/2')[0].num_parameters()


def test_limits_below_one_are_refused():
    for name in ('max_input', 'max_target'):
        with pytest.raises(UsageError, match=f'{name}=0: should be at least 1'):
            RunSpec(**{name: 0})
