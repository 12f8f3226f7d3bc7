"A hub of our own: it takes what huggingface_hub sends to make a repository and to commit files, or refuses it."

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

OID = 'c0ffee' + '0' * 34
SHORT = {'model': '', 'dataset': 'datasets/'}


class Hub:
    "In a thread; `status` is what it answers to a commit."

    def __init__(self, token, status=200):
        self.token, self.status, self.repos, self.files, self.headers = token, status, {}, {}, []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                sent = self.rfile.read(int(self.headers.get('Content-Length') or 0)) or self.chunks()
                hub.headers.append(dict(self.headers))
                status, answer = hub.answer(self.path, self.headers.get('Authorization'), sent)
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header('Content-Type', 'application/json')
                self.send_header('Content-Length', str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def chunks(self):
                whole = b''
                while self.headers.get('Transfer-Encoding') == 'chunked' and (
                    size := int(self.rfile.readline().split(b';')[0], 16)
                ):
                    whole += self.rfile.read(size)
                    self.rfile.readline()
                return whole

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server.server_port}'

    def answer(self, path, authorization, sent):
        if authorization != f'Bearer {self.token}':
            return 401, {'error': 'Invalid username or password.'}
        if path == '/api/repos/create':
            asked = json.loads(sent)
            kind, owner = asked.get('type') or 'model', asked.get('organization') or 'somebody'
            name = f'{owner}/{asked["name"]}'
            again = name in self.repos
            self.repos[name] = (kind, asked.get('visibility'))
            url = f'{self.url}/{SHORT[kind]}{name}'
            return (409, {'error': 'You already created this', 'url': url}) if again else (200, {'url': url})
        if path == '/api/validate-yaml':
            return 200, {'errors': [], 'warnings': []}
        if '/preupload/' in path:
            files = [dict(path=f['path'], uploadMode='regular', shouldIgnore=False) for f in json.loads(sent)['files']]
            return 200, {'files': files}
        if '/commit/' in path and self.status == 200:
            for line in map(json.loads, sent.splitlines()):
                if line['key'] == 'file':
                    self.files[line['value']['path']] = base64.b64decode(line['value']['content'])
            repo = path.removeprefix('/api/').removeprefix('models/').partition('/commit/')[0]
            return 200, {'success': True, 'commitOid': OID, 'commitUrl': f'{self.url}/{repo}/commit/{OID}'}
        return self.status if self.status != 200 else 404, {'error': 'You may not write here.'}

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
