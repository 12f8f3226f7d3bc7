"Runs that a test makes, with nothing kept."

from dsbs.runs.run import train_runs
from dsbs.runs.specs import prepare


def trained(spec):
    "Its record, model and tokenizer."
    return train_runs([prepare(spec)])[0]


def record_of(spec):
    return trained(spec).record
