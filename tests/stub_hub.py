"""A hub of our own on 127.0.0.1: what huggingface_hub asks of one, for folders of files, in each form of weights."""

import hashlib
import io
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import sentencepiece
import torch
from safetensors.torch import save_file
from small_t5 import CHARACTERS, WORDS
from transformers import T5Config, T5ForConditionalGeneration

NAME = 'google/t5-v1_1-small'


def spiece() -> bytes:
    "A sentencepiece model of T5's kind: pad, end and unknown come first."
    made, texts = io.BytesIO(), [' '.join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 8
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, *CHARACTERS]),
        model_writer=made,
        vocab_size=120,
        hard_vocab_limit=False,
        model_type='unigram',
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return made.getvalue()


def tiny(vocab=384) -> T5ForConditionalGeneration:
    "A T5 v1.1 of few weights, which follow from a seed; T5Tokenizer adds 100 pieces to those of `spiece`."
    torch.manual_seed(0)
    sizes = dict(vocab_size=vocab, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=4)
    habits = dict(feed_forward_proj='gated-gelu', scale_decoder_outputs=True, decoder_start_token_id=0)
    return T5ForConditionalGeneration(T5Config(**sizes, **habits))


def settings() -> dict[str, bytes]:
    "The files beside the weights, as google/t5-v1_1-* have them."
    ends = dict(eos_token='</s>', unk_token='<unk>', pad_token='<pad>')
    return {
        'config.json': tiny().config.to_json_string().encode(),
        'generation_config.json': b'{"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}',
        'special_tokens_map.json': json.dumps(ends).encode(),
        'spiece.model': spiece(),
    }


def state() -> dict:
    "Name -> weight, with the embeddings under all their names, as an old pickle has them."
    return {name: w.detach() for name, w in tiny().state_dict(keep_vars=True).items()}


def as_bin(weights, **how) -> bytes:
    made = io.BytesIO()
    torch.save(weights, made, **how)
    return made.getvalue()


def forms(folder: Path) -> dict[str, dict[str, bytes]]:  # Form -> file -> content
    "The weights in each form in which they lie on the hub."
    weights, folder = state(), Path(folder)
    own = {
        n: w.contiguous().clone()
        for n, w in weights.items()
        if not n.endswith(('embed_tokens.weight', 'lm_head.weight'))
    }
    names = sorted(own)
    half = [{n: own[n] for n in part} for part in (names[:9], names[9:])]

    def safe(tensors):
        save_file(tensors, folder / 'made', metadata=dict(format='pt'))
        return (folder / 'made').read_bytes()

    def parts(stem, end, write):
        files = {f'{stem}-0000{i + 1}-of-00002.{end}': part for i, part in enumerate(half)}
        index = {n: file for file, part in files.items() for n in part}
        found = {file: write(part) for file, part in files.items()}
        return found | {f'{stem}.{end}.index.json': json.dumps(dict(metadata={}, weight_map=index)).encode()}

    return {
        '.bin': {'pytorch_model.bin': as_bin(weights)},
        '.bin of before torch 1.6': {'pytorch_model.bin': as_bin(weights, _use_new_zipfile_serialization=False)},
        'safetensors': {'model.safetensors': safe(own)},
        '.bin in parts': parts('pytorch_model', 'bin', as_bin),
        'safetensors in parts': parts('model', 'safetensors', safe),
    }


OTHERS = {'flax_model.msgpack': b'flax', 'tf_model.h5': b'tf', 'README.md': b'T5', '.gitattributes': b''}


class Hub:
    """Serves `models`: name -> revision -> file -> content. `fault` is called with a path and gives None, 'cut', or a
    status with the hub's own code of an error, such as (403, 'GatedRepo')."""

    def __init__(self, models, fault=lambda path: None):
        self.models, self.fault, self.asked = models, fault, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                hub.answer(self)

            def do_GET(self):
                hub.answer(self)

            def do_CONNECT(self):
                hub.refuse(self, 407, 'a proxy that lets nothing pass')

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self.server.server_address[1]}'

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def commit(self, name, revision):
        "The commit of a revision: itself, or a hash of what it holds."
        if re.fullmatch('[0-9a-f]{40}', revision):
            return revision
        held = sorted((file, hashlib.sha256(data).hexdigest()) for file, data in self.models[name][revision].items())
        return hashlib.sha1(json.dumps([name, held]).encode()).hexdigest()

    def find(self, name, revision):  # the files, the commit
        for known in self.models[name]:
            if revision in (known, self.commit(name, known)):
                return self.models[name][known], self.commit(name, known)
        return None, None

    def answer(self, request):
        path = unquote(urlsplit(request.path).path)
        self.asked.append((request.command, path))
        api = re.fullmatch(r'/api/models/([^/]+/[^/]+)/revision/(.+)', path)
        file = re.fullmatch(r'/([^/]+/[^/]+)/resolve/([0-9a-f]{40}|[^/]+)/(.+)', path)
        name, revision = (api or file).groups()[:2] if api or file else ('', '')
        fault = self.fault(path)
        if isinstance(fault, tuple):
            return self.refuse(request, *fault)
        if name not in self.models:
            return self.refuse(request, 404, 'RepoNotFound')
        files, commit = self.find(name, revision)
        if files is None:
            return self.refuse(request, 404, 'RevisionNotFound')
        if api:
            held = [dict(rfilename=file, size=len(data)) for file, data in files.items()]
            return self.send(request, json.dumps(dict(id=name, sha=commit, siblings=held)).encode(), commit)
        if file[3] not in files:
            return self.refuse(request, 404, 'EntryNotFound')
        self.send(request, files[file[3]], commit, cut=fault == 'cut')

    def refuse(self, request, status, code):
        request.send_response(status)
        request.send_header('X-Error-Code', code)
        request.send_header('Content-Length', '0')
        request.end_headers()

    def send(self, request, data, commit, cut=False):
        start = int((request.headers.get('Range') or 'bytes=0-').removeprefix('bytes=').partition('-')[0])
        request.send_response(206 if start else 200)
        request.send_header('X-Repo-Commit', commit)
        request.send_header('ETag', f'"{hashlib.sha256(data).hexdigest()}"')
        request.send_header('Accept-Ranges', 'bytes')
        if start:
            request.send_header('Content-Range', f'bytes {start}-{len(data) - 1}/{len(data)}')
        request.send_header('Content-Length', str(len(data) - start))
        request.end_headers()
        if request.command == 'GET' and cut:
            request.close_connection = True
            return
        if request.command == 'GET':
            request.wfile.write(data[start:])
