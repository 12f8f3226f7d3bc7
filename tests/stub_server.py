"A server that speaks as an OpenAI-compatible one does, and fails as they do."

import asyncio
import hashlib
import json
import sys
import threading
from collections import Counter

PASSING = (
    'drop',
    'cut off',
    'slow',
    '429 after 0',
    '429 after 1',
    '429 after 600',
    '429 after soon',
    'status 500',
    'status 503',
    'web page',
    'bad json',
    'not utf-8',
    'error in 200',
    'no choices',
    'a list',
)
LASTING = {
    'refusal': 'refusal',
    'length': 'cut short',
    'other model': 'wrong model',
    'blank': 'empty',
    'null content': 'empty',
    'huge': 'too long',
    'status 400': 'request refused (400)',
}


def completion(content='Because. So the answer is yes.', ended='stop', model='m', **more):
    return json.dumps(
        {
            'id': 'x',
            'object': 'chat.completion',
            'created': 0,
            'model': model,
            'choices': [{'index': 0, 'message': {'role': 'assistant', 'content': content}, 'finish_reason': ended}],
            'usage': {'prompt_tokens': 20, 'completion_tokens': 10, 'total_tokens': 30},
        }
        | more
    ).encode()


BODIES = {
    'web page': b'<html>busy</html>',
    'null content': completion(None),
    'bad json': b'{"choices": [',
    'not utf-8': b'\xff\xfe\x00',
    'a list': b'[1]',
    'error in 200': b'{"error": {"message": "overloaded"}}',
    'no choices': completion(choices=[]),
    'refusal': completion('', ended='content_filter'),
    'length': completion('Because of', ended='length'),
    'other model': completion(model='another'),
    'blank': completion('  '),
    'huge': completion('x' * 5_000_000),
}


class Stub:
    "A server in a thread; `fault` gives the kind of fault for a text, `latency` the seconds of each answer."

    def __init__(self, fault=lambda text: None, latency=0.0):
        self.fault, self.latency, self.served, self.seen, self.bodies = fault, latency, Counter(), Counter(), Counter()
        self.loop, ready = asyncio.new_event_loop(), threading.Event()

        async def start():
            self.server = await asyncio.start_server(self._talk, '127.0.0.1', 0, limit=2**24)
            self.url = f'http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/v1'
            ready.set()

        def serve():
            asyncio.set_event_loop(self.loop)
            self.loop.run_until_complete(start())
            self.loop.run_forever()

        threading.Thread(target=serve, daemon=True).start()
        ready.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.loop.stop)

    async def _talk(self, reader, writer):
        try:
            while head := await reader.readuntil(b'\r\n\r\n'):
                lengths = [line for line in head.split(b'\r\n') if line.lower().startswith(b'content-length')]
                size = int(lengths[0].split(b':')[1])
                asked = json.loads(await reader.readexactly(size))
                text = asked['messages'][-1]['content'] if 'messages' in asked else asked['prompt']
                self.seen[text] += 1
                fault = self.fault(text)
                if fault in PASSING and self.seen[text] > 1:
                    fault = None
                await asyncio.sleep(0.6 if fault == 'slow' else self.latency)
                if fault == 'drop':
                    break
                status, headers, body = self._reply(fault, asked)
                kind = 'Content-Type: application/json\r\n'
                start = f'HTTP/1.1 {status} X\r\n{kind}{headers}Content-Length: {len(body)}\r\n\r\n'
                raw = start.encode() + body
                if fault == 'cut off':
                    writer.write(raw[:-20])
                    await writer.drain()
                    break
                writer.write(raw)
                await writer.drain()
                if status == 200:
                    self.served[text] += 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _reply(self, fault, asked):
        if fault and fault.startswith('429'):
            return 429, f'Retry-After: {fault.split()[-1]}\r\n', b'{"error": {"message": "slow down"}}'
        if fault and fault.startswith('status'):
            return int(fault.split()[-1]), '', b'{"error": {"message": "no"}}'
        return 200, '', BODIES[fault] if fault in BODIES else completion(model=asked['model'])


class Thinks(Stub):
    "A reasoning model, which thinks in a form of `THOUGHTS`; `cut` tells at which texts it never ends its thoughts."

    def __init__(self, form, thought, answer='So the answer is yes.', cut=lambda text: False):
        super().__init__()
        self.form, self.thought, self.answer, self.cut = form, thought, answer, cut

    def _reply(self, fault, asked):
        text = asked['messages'][-1]['content']
        cut = self.cut(text)
        choice = THOUGHTS[self.form](self.thought, None if cut else self.answer)
        ended = dict(finish_reason='length' if cut == 'length' else 'stop', index=0)
        usage = dict(prompt_tokens=20, completion_tokens=100, total_tokens=120)
        if self.form == 'counted':
            usage |= dict(completion_tokens_details=dict(reasoning_tokens=90))
        return 200, '', completion(model=asked['model'], choices=[dict(message=choice, **ended)], usage=usage)


THOUGHTS = {  # form -> the message; an answer of None: it never ended its thoughts
    'counted': lambda thought, answer: dict(role='assistant', reasoning_content=thought, content=answer),
    'field': lambda thought, answer: dict(role='assistant', reasoning=thought, content=answer),
    'parts': lambda thought, answer: dict(
        role='assistant',
        content=[dict(type='thinking', thinking=[dict(type='text', text=thought)])]
        + ([dict(type='text', text=answer)] if answer else []),
    ),
    'tags': lambda thought, answer: dict(
        role='assistant', content=f'<think>\n{thought}\n' + (f'</think>\n\n{answer}' if answer else '')
    ),
    'lone end': lambda thought, answer: dict(
        role='assistant', content=f'{thought}\n</think>\n\n{answer}' if answer else f'<think>{thought}'
    ),
}


def faults(share=0.2):
    "A fault for a share of the texts, which depends on the text alone."
    kinds = (*PASSING, *LASTING)

    def fault(text):
        n = int(hashlib.sha256(text.encode()).hexdigest(), 16)
        return kinds[n // 1000 % len(kinds)] if n % 1000 < 1000 * share else None

    return fault


if __name__ == '__main__':  # LATENCY: in a process of its own, until standard input ends
    with Stub(latency=float(sys.argv[1])) as stub:
        print(stub.url, flush=True)
        sys.stdin.read()
