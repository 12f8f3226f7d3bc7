from configparser import ConfigParser

from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=['='])
cfg.read('settings.ini', encoding='utf-8')
s = cfg['DEFAULT']
setup(
    name=s['lib_name'],
    version=s['version'],
    description=s['description'],
    license='Apache-2.0',
    author=s['author'],
    packages=find_packages(include=[f'{s["lib_path"]}*']),
    python_requires=f'>={s["min_python"]}',
    install_requires=s['requirements'].split(),
    extras_require={'dev': s['dev_requirements'].split(), 'llm': s['llm_requirements'].split()},
    entry_points={'console_scripts': s['console_scripts'].split()},
)
