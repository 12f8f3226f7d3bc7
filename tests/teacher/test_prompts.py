"The exemplars are ours alone, and what is written can be read."

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsbs.data.embedded import EMBEDDED, embedded_task
from dsbs.data.paper import PAPER, load_rows
from dsbs.data.tasks import TASKS
from dsbs.records import UsageError
from dsbs.teacher.extraction import read_completion
from dsbs.teacher.formats import FORMATS, answer_format, write_answer
from dsbs.teacher.prompts import load_prompt


def plain(text):
    return ' '.join(''.join(c if c.isalnum() else ' ' for c in text.casefold()).split())


def stem(text):
    return plain(text.split('</s>')[0].split('\nAnswer Choices:')[0])


@pytest.mark.parametrize('name', PAPER)
def test_no_exemplar_is_in_a_dataset(recorded, name):
    ours = {stem(e.input) for e in load_prompt(name).exemplars}
    assert len(ours) == len(load_prompt(name).exemplars)
    splits = [s for s, word in PAPER[name].files.items() if (Path(recorded) / name / f'{name}_{word}.json').is_file()]
    if not splits:
        pytest.skip(f'no file of {name}')
    for split in splits:
        assert not ours & {stem(r['input']) for r in load_rows(name, split, Path(recorded) / name)}


@pytest.mark.parametrize('name', EMBEDDED)
def test_embedded_exemplars_are_true_and_from_train(name):
    for seed in (0, 1):
        task, exemplars = embedded_task(name, seed), load_prompt(name, seed).exemplars
        gold = dict(zip(task['train']['input'], task['train']['label']))
        assert all(gold[e.input] == e.label for e in exemplars)
        assert Counter(e.label for e in exemplars) == {'yes': 4, 'no': 4}


@pytest.mark.parametrize('name', TASKS)
def test_rationales_are_short_and_inputs_differ(name):
    exemplars = load_prompt(name).exemplars
    assert len({e.input for e in exemplars}) == len(exemplars)
    assert all(1 <= e.rationale.count('. ') + 1 <= 3 and e.rationale.endswith('.') for e in exemplars)


text = st.one_of(
    st.text(max_size=40),
    st.text('(). QA:1+\nPremise', max_size=40),
    st.lists(
        st.sampled_from(
            [
                'So the answer is',
                'The answer is',
                'Answer:',
                'Q:',
                'Premise:',
                'U.S.',
                '(1 + 2)',
                'yes',
                '\n',
                '{label}',
            ]
        ),
        max_size=5,
    ).map(' '.join),
)


@given(text, text, st.sampled_from([*FORMATS.values(), *map(answer_format, ('label', 'text', 'equation'))]))
@settings(max_examples=500)
def test_what_is_written_is_read_back_or_refused(rationale, label, form):
    asked = f'Which?\nAnswer Choices:\n(a) none\n(b) {label}'
    try:
        written = write_answer(form, asked, rationale, label)
    except UsageError:
        return
    read = read_completion(f'{written}\n\n{form.stop} Next?', form)
    assert (read.rationale, read.label, read.reason) == (' '.join(rationale.split()), label, '')
