"""What each driver has earned so far, point-in-time from a DuckLake: `python examples/feast/rides.py`."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
from feast import Entity, FeatureStore, FeatureView, Field, ValueType
from feast.types import Float64, Int64

from feast_ducklake import DuckLakeSource, open_lake

driver = Entity(name="driver", join_keys=["driver_id"], value_type=ValueType.INT64)
earnings = FeatureView(
    name="earnings",
    entities=[driver],
    ttl=timedelta(0),  # values live for ever
    schema=[Field(name="rides", dtype=Int64), Field(name="earned", dtype=Float64)],
    source=DuckLakeSource(name="earnings", table="earnings"),
)

if __name__ == "__main__":
    store = FeatureStore(str(Path(__file__).parent))
    with open_lake(store.config, create=True) as lake:  # a DuckDB connection
        lake.execute("""
            CREATE OR REPLACE TABLE earnings AS
            SELECT i % 3 AS driver_id, TIMESTAMPTZ '2024-01-01' + INTERVAL 1 HOUR * i AS event_timestamp,
                i // 3 + 1 AS rides, 7.5 * rides::DOUBLE AS earned
            FROM range(30) AS t(i)
        """)
    store.apply([driver, earnings])
    noon = datetime(2024, 1, 1, 12, tzinfo=UTC)
    asked = pd.DataFrame({"driver_id": [0, 1, 9], "event_timestamp": [noon, noon, noon]})
    print(store.get_historical_features(asked, ["earnings:rides", "earnings:earned"]).to_df())
    store.materialize(datetime(1970, 1, 1, tzinfo=UTC), datetime.now(UTC))
    print(store.get_online_features(["earnings:rides"], [{"driver_id": 1}]).to_dict())
