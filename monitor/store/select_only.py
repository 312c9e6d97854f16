"""What a text that is not trusted may ask: one SELECT over a store's views, by an allow-list on the parsed tree.

The tree is DuckDB's own (`json_serialize_sql`). Every node, expression, table and function in it must be known here:
what a later DuckDB adds is refused until someone has looked at it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import duckdb

from monitor.errors import StoreError
from monitor.store.macros import MACROS
from monitor.store.schema import TABLES

_OF_TABLES = {name for table in TABLES for name in (table, f"{table}_all", f"{table}_segments")}
VIEWS = {*_OF_TABLES, "commits", "edges", "heartbeats", "run_files", "runs"}
_NODES = {
    *("SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"),
    *(
        "BASE_TABLE",
        "SUBQUERY",
        "JOIN",
        "EXPRESSION_LIST",
        "EMPTY",
        "EMPTY_FROM",
        "TABLE_FUNCTION",
        "PIVOT",
        "SHOW_REF",
    ),
    *("ORDER_MODIFIER", "LIMIT_MODIFIER", "LIMIT_PERCENT_MODIFIER", "DISTINCT_MODIFIER"),
    *("ORDER_DEFAULT", "ASCENDING", "DESCENDING"),
}
_EXPRESSIONS = set(
    "BETWEEN CASE CAST COLLATE COLUMN_REF COMPARISON CONJUNCTION CONSTANT FUNCTION LAMBDA LAMBDA_REF OPERATOR "
    "PARAMETER POSITIONAL_REFERENCE STAR SUBQUERY TYPE WINDOW".split()
)
_DESCRIPTIONS = {"DESCRIBE", "SUMMARY"}
_TABLE_FUNCTIONS = {*MACROS, "range", "generate_series", "unnest", "json_each", "json_tree"}
_NAME = re.compile(r"\w+")  # of a CTE: never one that could be the name of a file
# Functions of their arguments alone: no file, no setting, no variable, no sequence, no log.
_FUNCTIONS = set(
    """
    != !~~ !~~* % & && * ** + - -> ->> / // < <-> << <= <=> <@ = > >= >> @ @> ^ ^@ | || ~ ~~ ~~* ~~~ !
    hist_quantile hist_cell hist_interpolate
    any_value approx_count_distinct approx_quantile approx_top_k arbitrary arg_max arg_max_null arg_max_nulls_last
    arg_min arg_min_null arg_min_nulls_last argmax argmin array_agg avg bit_and bit_or bit_xor bitstring_agg bool_and
    bool_or corr count count_if count_star countif covar_pop covar_samp entropy favg first fsum geomean
    geometric_mean group_concat histogram histogram_exact kahan_sum kurtosis kurtosis_pop last list listagg lttb mad
    max max_by mean median min min_by mode product quantile quantile_cont quantile_disc regr_avgx regr_avgy
    regr_count regr_intercept regr_r2 regr_slope regr_sxx regr_sxy regr_syy reservoir_quantile sem skewness stddev
    stddev_pop stddev_samp string_agg sum sum_no_overflow sumkahan var_pop var_samp variance wavg weighted_avg
    json_group_array json_group_object
    cume_dist dense_rank fill first_value lag last_value lead nth_value ntile percent_rank rank rank_dense row_number
    abs acos acosh add asin asinh atan atan2 atanh bin bit_count cbrt ceil ceiling cos cosh cot degrees divide even
    exp factorial fdiv floor fmod gamma gcd greatest greatest_common_divisor isfinite isinf isnan lcm least
    least_common_multiple lgamma ln log log10 log2 mod multiply nextafter pi pow power radians round round_even
    roundbankers sign signbit sin sinh sqrt subtract tan tanh trunc xor equi_width_bins bar
    ascii base64 bit_length char_length character_length chr concat concat_ws contains damerau_levenshtein decode
    editdist3 encode ends_with format format_bytes formatreadabledecimalsize formatreadablesize from_base64
    from_binary from_hex hamming hash hex instr jaccard jaro_similarity jaro_winkler_similarity lcase left
    left_grapheme len length length_grapheme levenshtein lower lpad ltrim md5 md5_number mismatches nfc_normalize
    octet_length ord overlay position prefix printf regexp_escape regexp_extract regexp_extract_all
    regexp_full_match regexp_matches regexp_replace regexp_split_to_array regexp_split_to_table repeat replace
    reverse right right_grapheme rpad rtrim sha1 sha256 split split_part sqrt starts_with str_split str_split_regex
    string_split string_split_regex string_to_array strip_accents strlen strpos substr substring substring_grapheme
    suffix to_base to_base64 to_binary to_hex translate trim ucase unbin unhex unicode upper url_decode url_encode
    like_escape ilike_escape not_like_escape not_ilike_escape parse_dirname parse_dirpath parse_filename parse_path
    age ago century current_date current_localtime current_localtimestamp current_timestamp current_time date_add
    date_diff date_part date_sub date_trunc datediff datepart datesub datetrunc day dayname dayofmonth dayofweek
    dayofyear days_in_month decade epoch epoch_ms epoch_ns epoch_us era get_current_time get_current_timestamp hour
    isodow isoyear julian last_day make_date make_time make_timestamp make_timestamp_ms make_timestamp_ns
    make_timestamptz microsecond millennium millisecond minute month monthname nanosecond normalized_interval now
    quarter second strftime strptime time_bucket timezone timezone_hour timezone_minute to_centuries to_days
    to_decades to_hours to_microseconds to_millennia to_milliseconds to_minutes to_months to_quarters to_seconds
    to_timestamp to_weeks to_years today transaction_timestamp try_strptime week weekday weekofyear year yearweek
    aggregate apply array_aggr array_aggregate array_append array_apply array_cat array_concat array_contains
    array_cosine_distance array_cosine_similarity array_cross_product array_distance array_distinct array_dot_product
    array_extract array_filter array_grade_up array_has array_has_all array_has_any array_indexof
    array_inner_product array_intersect array_length array_pop_back array_pop_front array_position array_prepend
    array_push_back array_push_front array_reduce array_resize array_reverse array_reverse_sort array_select
    array_slice array_sort array_to_json array_to_string array_transform array_unique array_value array_where
    array_zip cardinality element_at filter flatten generate_series generate_subscripts grade_up list_aggr
    list_aggregate list_any_value list_append list_apply list_approx_count_distinct list_avg list_bit_and list_bit_or
    list_bit_xor list_bool_and list_bool_or list_cat list_concat list_contains list_cosine_distance
    list_cosine_similarity list_count list_distance list_distinct list_dot_product list_element list_entropy
    list_extract list_filter list_first list_grade_up list_has list_has_all list_has_any list_histogram list_indexof
    list_inner_product list_intersect list_kurtosis list_kurtosis_pop list_last list_mad list_max list_median
    list_min list_mode list_pack list_position list_prepend list_product list_reduce list_resize list_reverse
    list_reverse_sort list_select list_sem list_skewness list_slice list_sort list_stddev_pop list_stddev_samp
    list_string_agg list_sum list_transform list_unique list_value list_var_pop list_var_samp list_where list_zip
    range reduce unnest unpivot_list
    map map_concat map_contains map_contains_entry map_contains_value map_entries map_extract map_extract_value
    map_from_entries map_keys map_values row struct_concat struct_contains struct_extract struct_extract_at
    struct_has struct_indexof struct_insert struct_keys struct_pack struct_position struct_update struct_values
    union_extract union_tag union_value remap_struct
    from_json from_json_strict json json_array json_array_length json_contains json_deep_merge json_exists
    json_extract json_extract_path json_extract_path_text json_extract_string json_keys json_merge_patch
    json_object json_pretty json_quote json_structure json_transform json_transform_strict json_type json_valid
    json_value row_to_json to_json
    alias coalesce constant_or_null error get_type if ifnull is_histogram_other_bin nullif pg_typeof switch try
    typeof random setseed uuid gen_random_uuid __between
    """.split()
)


def require_select(con: duckdb.DuckDBPyConnection, query: str) -> None:
    """Raises StoreError for anything but one SELECT that reads the store's views and its own values alone."""
    kinds = [str(statement.type).rpartition(".")[2] for statement in con.extract_statements(query)]
    if kinds != ["SELECT"]:
        raise StoreError(f"A locked store answers one SELECT at a time, got {', '.join(kinds) or 'nothing'}.")
    [(text,)] = con.execute("SELECT json_serialize_sql(?)", [query]).fetchall()
    try:
        tree = json.loads(text)
        if tree.get("error") or len(tree["statements"]) != 1:
            raise StoreError(
                f"A locked store cannot judge this query: {tree.get('error_message', 'no single SELECT')}."
            )
        parts = list(_parts(tree["statements"]))
    except RecursionError:
        raise StoreError("A locked store cannot judge this query: it is nested too deeply.") from None
    names = {entry["key"].lower() for part in parts for entry in part.get("cte_map", {}).get("map", [])}
    names = {name for name in names if _NAME.fullmatch(name)} | VIEWS
    of_tables = {id(part["function"]) for part in parts if part.get("type") == "TABLE_FUNCTION"}
    for part in parts:
        _require_known(part, names, id(part) in of_tables)


def _parts(tree: Any) -> Iterator[dict[str, Any]]:
    """Every object of a tree, however deep."""
    if isinstance(tree, dict):
        yield tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            yield from _parts(branch)


def _require_known(part: dict[str, Any], names: set[str], of_table: bool) -> None:
    kind, group = part.get("type"), part.get("class")
    if group is not None:
        if group not in _EXPRESSIONS:
            raise StoreError(f"A locked store does not know the expression {group}: it answers plain SELECTs.")
        if "function_name" in part:
            name, known = str(part["function_name"]).lower(), _TABLE_FUNCTIONS if of_table else _FUNCTIONS
            if name not in known or part.get("catalog") or part.get("schema") not in ("", "main", None):
                raise StoreError(
                    f"A locked store does not allow the function {name!r}: it reads the store's views alone."
                )
    elif isinstance(kind, str):
        if kind not in _NODES:
            raise StoreError(f"A locked store does not know the clause {kind}: it answers plain SELECTs.")
        if kind == "BASE_TABLE":
            name = str(part["table_name"])
            path = [*part.get("qualified_name", {}).get("path", [name])]
            if name.lower() not in names or part.get("at_clause") or [p for p in path[:-1] if p not in ("", "main")]:
                raise StoreError(f"A locked store has no table {name!r}. It has {', '.join(sorted(VIEWS))}.")
        elif kind == "SHOW_REF" and (part.get("show_type") not in _DESCRIPTIONS or not part.get("query")):
            raise StoreError("A locked store describes its views (DESCRIBE steps) and nothing else.")
