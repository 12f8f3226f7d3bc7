"""A tiny T5 with random weights whose tokenizer, like T5's own, normalises by NFKC and has no { } < ~ ^ and few
letters of other scripts."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

WORDS = (
    'my card was charged twice for order the parcel low high income label rationale So answer is because it of says'
).split()
CHARACTERS = 'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZéüäöß0123456789.,;:!?()[]+-*/%&#@\'"$=>'


def small_tokenizer(pad='<pad>', end='</s>', first=(), ends=True, more=()):
    "`first`: pieces before all others; `ends`: put the end token after a text."
    pieces = [
        *first,
        *(p for p in ('<pad>', '</s>', '<unk>') if p not in first),
        '▁',
        *(f'▁{w}' for w in WORDS),
        *CHARACTERS,
        *more,
    ]
    raw = Tokenizer(
        models.Unigram(
            [(p, 0.0 if p[0] == '<' else -2.0 if len(p) > 1 else -4.0) for p in pieces], unk_id=pieces.index('<unk>')
        )
    )
    raw.normalizer, raw.pre_tokenizer, raw.decoder = (
        normalizers.NFKC(),
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme='always')]),
        decoders.Metaspace(prepend_scheme='always'),
    )
    if ends:
        raw.post_processor = processors.TemplateProcessing(
            single=f'$A {end}', special_tokens=[(end, pieces.index(end))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=pad, eos_token=end, unk_token='<unk>')


def small_t5(folder, tokenizer=None, **config):
    "A folder with one; 0.1 million weights."
    tokenizer = tokenizer or small_tokenizer()
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(
        T5Config(
            **dict(
                vocab_size=len(tokenizer),
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                feed_forward_proj='gated-gelu',
                dropout_rate=0.0,
                scale_decoder_outputs=True,
                decoder_start_token_id=0,
            )
            | config
        )
    )
    t5.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def change(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def weights(folder, work):
    "Let `work` change the weights of a folder, in place."
    path = folder / 'model.safetensors'
    found = load_file(path)
    work(found)
    save_file({name: w.contiguous() for name, w in found.items()}, path, metadata=dict(format='pt'))


def own_task(folder, labels=('low', 'high'), n=60, answer='label', text='{word} income of order {i}'):
    "A task folder whose first label follows from the word low, and the second from high."
    folder.mkdir()
    named = f'labels = {json.dumps(list(labels))}\n' if answer == 'label' else ''
    (folder / 'task.toml').write_text(
        f'name = "levels"\ninstruction = "Say which."\nanswer = "{answer}"\n{named}', encoding='utf-8'
    )
    rows = [
        dict(id=f'r{i}', input=text.format(word=('low', 'high')[i % 2], i=i), label=labels[i % len(labels)])
        for i in range(n)
    ]
    (folder / 'train.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows), encoding='utf-8')
    return rows


def rationale_set(folder, rows, rationale=lambda row: f'It says {row["label"]}.', label=lambda row: row['label']):
    "What a teacher said of an own task's rows, as a folder."
    folder.mkdir()
    for split in ('train', 'validation', 'test'):
        (folder / f'{split}.jsonl').write_text(
            ''.join(
                json.dumps(
                    dict(id=r['id'], input=r['input'], rationale=rationale(r), label=label(r), votes=1, others=[])
                )
                + '\n'
                for r in rows
            )
        )
        (folder / f'{split}.failures.jsonl').write_text('')
        (folder / f'{split}.card.json').write_text(json.dumps(dict(task='levels', model='a model', prompt='x')))
