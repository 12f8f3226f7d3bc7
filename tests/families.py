"""A tiny student with random weights of each family, with a tokenizer of its kind, made here: nothing is fetched."""

import json
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartTokenizer,
    ByT5Tokenizer,
    GemmaTokenizer,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    T5Gemma2Config,
    T5Gemma2ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    T5Tokenizer,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

TEXT = (
    '[label] my card says low or high income of order 12',
    '[rationale] It says low. It says high. So the answer is',
)
GATED = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj='gated-gelu')
GEMMA = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    query_pre_attn_scalar=8,
    sliding_window=64,
)
SIGHT = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
    model_type='siglip_vision_model',
)


def gemma_tokenizer(**how):
    "Gemma's: byte-pair merges over characters with bytes to fall back to; a start token in front, no end behind."
    pieces = ['<pad>', '<eos>', '<bos>', '<unk>', '<mask>', *(f'<0x{i:02X}>' for i in range(256))]
    pieces += ['▁', *sorted({c for text in TEXT for c in text} - {' '}), 'lo', 'low', 'hi']
    merges = [('l', 'o'), ('lo', 'w'), ('h', 'i')]
    return GemmaTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=merges, **{'add_bos_token': True} | how)


def bart_tokenizer():
    "BART's: byte-pair merges over bytes; a start token in front, an end token behind."
    raw, special = ByteLevelBPETokenizer(), ['<s>', '<pad>', '</s>', '<unk>', '<mask>']
    raw.train_from_iterator(TEXT, vocab_size=300, min_frequency=2, special_tokens=special, show_progress=False)
    merges = [tuple(merge) for merge in json.loads(raw.to_str())['model']['merges']]
    return BartTokenizer(vocab=raw.get_vocab(), merges=merges)


def gemma_parts(tokens):
    return dict(GEMMA, vocab_size=len(tokens), pad_token_id=0, eos_token_id=1, bos_token_id=2, initializer_range=0.1)


def t5_tokenizer(texts=TEXT, sentinels=2):
    "T5's and mT5's: pieces with scores, and sentinels, which have the last places."
    characters = sorted({c for text in texts for c in text} - {' '})
    pieces = [*((special, 0.0) for special in ('<pad>', '</s>', '<unk>')), ('▁', -2.0), ('▁low', -3.0), ('▁high', -3.0)]
    return T5Tokenizer(vocab=[*pieces, *((c, -4.0) for c in characters)], extra_ids=sentinels)


def of_t5(model, config, tokens, untied=False, **more):
    "`untied`: a head of its own, as Google's v1.1 checkpoints have it."
    student = model(config(**dict(GATED, vocab_size=len(tokens), decoder_start_token_id=0) | more))
    if untied:
        student.lm_head.weight = torch.nn.Parameter(student.lm_head.weight.detach().clone() / 4)
        student.config.tie_word_embeddings = student.config.scale_decoder_outputs = False
    return student, tokens


def t5gemma(tokens, **more):
    parts = gemma_parts(tokens)
    return T5GemmaForConditionalGeneration(
        T5GemmaConfig(encoder=parts, decoder=parts, vocab_size=len(tokens), **more)
    ), tokens


def t5gemma2(tokens, **more):
    parts = gemma_parts(tokens)
    seen = dict(mm_tokens_per_image=4, image_token_index=len(tokens) - 1, eoi_token_index=len(tokens) - 2)
    encoder = dict(text_config=parts, vision_config=SIGHT, **seen)
    config = T5Gemma2Config(encoder=encoder, decoder=parts, image_token_index=len(tokens) - 1, **more)
    return T5Gemma2ForConditionalGeneration(config), tokens


def bart(tokens):
    depth = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    size = dict(d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=256, init_std=0.1)
    return BartForConditionalGeneration(BartConfig(vocab_size=len(tokens), **depth, **size)), tokens


def t5(**more):
    return of_t5(T5ForConditionalGeneration, T5Config, more.pop('tokens', None) or t5_tokenizer(), **more)


FAMILIES = {
    'mt5': lambda texts: of_t5(MT5ForConditionalGeneration, MT5Config, t5_tokenizer(texts, sentinels=0), untied=True),
    'umt5': lambda texts: of_t5(UMT5ForConditionalGeneration, UMT5Config, t5_tokenizer(texts)),
    'byt5': lambda texts: t5(tokens=ByT5Tokenizer(), vocab_size=384, num_layers=3, num_decoder_layers=1, untied=True),
    'flan-t5': lambda texts: t5(tokens=t5_tokenizer(texts), untied=True),
    't5-efficient': lambda texts: t5(
        tokens=t5_tokenizer(texts), feed_forward_proj='relu', num_layers=4, num_decoder_layers=2, vocab_size=256
    ),
    't5gemma': lambda texts: t5gemma(gemma_tokenizer()),
    't5gemma2': lambda texts: t5gemma2(gemma_tokenizer()),
    'bart': lambda texts: bart(bart_tokenizer()),
}


def family(name, folder, texts=TEXT, seed=0):
    "A folder with a student of a family, as `save_pretrained` writes it."
    torch.manual_seed(seed)
    student, tokenizer = FAMILIES[name](texts)
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
