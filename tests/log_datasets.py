"A source as a Dataset in memory, for tests."
import pandas as pd

from recgen.formats.dataset import Dataset
from recgen.sources.assemble import item_table, user_table
from recgen.sources.log import read_log

def dataset_of(source, name="toy", **how):
    with read_log(source, **how) as log:
        return Dataset(pd.concat(log.frames(), ignore_index=True), item_table(log), {"name": name, "tie_policy": log.tie_policy, "split": log.split}, user_table(log), source=source.file)
