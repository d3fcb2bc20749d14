//! Reads TOML, YAML and JSON files into located values. It knows no key.

use std::{fmt, fs, io, ops::Range, path::Path, sync::Arc};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_saphyr::Spanned;
use toml::de::{DeTable, DeValue};

use super::{
    fault::{Fault, Place},
    node::{Entry, Node, Value},
};

/// Errors of syntax that one file is told: each may lead to others that are none.
const SYNTAX_FAULTS_MAX: usize = 5;

/// A file's values, and whether keys that nobody knows are passed over in it: the Python library writes YAML, and passes
/// over what it doesn't know.
pub(super) struct File {
    pub(super) root: Node,
    pub(super) lenient: bool,
}

pub(super) fn read(path: &Path) -> Result<File, Vec<Fault>> {
    parse_read(fs::read_to_string(path), &path.into())
}

/// The same, of TOML as far as it can be parsed.
pub(super) fn read_in_part(path: &Path) -> Result<File, Vec<Fault>> {
    let text = fs::read_to_string(path);
    match (kind(path), &text) {
        (Kind::Toml, Ok(text)) => Ok(File { root: toml(text, &path.into()).0, lenient: false }),
        _ => parse_read(text, &path.into()),
    }
}

/// Parses what was read of a file.
pub(super) fn parse_read(text: io::Result<String>, path: &Arc<Path>) -> Result<File, Vec<Fault>> {
    let text = text.map_err(|error| {
        let fault = Fault::unreadable(&Place::Whole(Arc::clone(path)), "", &error);
        vec![fault.hint("name the files with --config, or in MODALKIT_CONFIG with commas between them")]
    })?;
    parse(&text, path)
}

enum Kind {
    Toml,
    Yaml,
    Json,
}

fn kind(path: &Path) -> Kind {
    let extension = path.extension().and_then(|kind| kind.to_str()).map(str::to_ascii_lowercase);
    match extension.as_deref() {
        Some("yaml" | "yml") => Kind::Yaml,
        Some("json") => Kind::Json,
        _ => Kind::Toml,
    }
}

pub(super) fn parse(text: &str, path: &Arc<Path>) -> Result<File, Vec<Fault>> {
    match kind(path) {
        Kind::Yaml => Ok(File { root: yaml(text, path)?, lenient: true }),
        // JSON is a part of YAML.
        Kind::Json => Ok(File { root: yaml(text, path)?, lenient: false }),
        Kind::Toml => match toml(text, path) {
            (root, faults) if faults.is_empty() => Ok(File { root, lenient: false }),
            (_, faults) => Err(faults),
        },
    }
}

/// What could be parsed, and what could not.
fn toml(text: &str, path: &Arc<Path>) -> (Node, Vec<Fault>) {
    let (table, errors) = DeTable::parse_recoverable(text);
    let lines = Lines::of(text, path);
    let root = Node::new(Value::Map(of_table(table.get_ref(), &lines)), lines.at(0));
    let mut faults: Vec<Fault> = Vec::new();
    let mut spans: Vec<(usize, &str)> =
        errors.iter().map(|error| (error.span().map_or(0, |span| span.start), error.message())).collect();
    spans.sort_by_key(|(start, _)| *start);
    for (start, message) in spans {
        let at = lines.at(start);
        let same_line = |fault: &Fault| matches!((&fault.at, &at), (Place::File { line: a, .. }, Place::File { line: b, .. }) if a == b);
        if faults.len() < SYNTAX_FAULTS_MAX && !faults.iter().any(same_line) {
            let hint = if message.contains("duplicate key") {
                "remove one of the two"
            } else {
                "a text stands in double quotes, a truth value is true or false, a number has no unit; each `key = value` has a line of its own"
            };
            faults.push(Fault::new(&at, "", "TOML", message).hint(hint));
        }
    }
    (root, faults)
}

fn of_table(table: &DeTable<'_>, lines: &Lines<'_>) -> Vec<Entry> {
    let entry = |(key, value): (&toml::Spanned<_>, &toml::Spanned<DeValue<'_>>)| Entry {
        name: AsRef::<str>::as_ref(key.get_ref()).to_owned(),
        at: lines.at(key.span().start),
        node: of_toml(value, lines),
    };
    let mut entries: Vec<Entry> = table.iter().map(entry).collect();
    entries.sort_by(|a, b| a.at.cmp(&b.at));
    entries
}

fn of_toml(value: &toml::Spanned<DeValue<'_>>, lines: &Lines<'_>) -> Node {
    let Range { start, .. } = value.span();
    let read = match value.get_ref() {
        DeValue::String(text) => Value::Text(text.to_string()),
        DeValue::Integer(number) => {
            let digits = number.as_str().replace('_', "");
            i128::from_str_radix(&digits, number.radix()).map_or_else(|_| Value::Text(digits), Value::Integer)
        }
        DeValue::Float(number) => number
            .as_str()
            .replace('_', "")
            .parse()
            .map_or_else(|_| Value::Text(number.as_str().to_owned()), Value::Float),
        DeValue::Boolean(value) => Value::Bool(*value),
        DeValue::Datetime(moment) => Value::Text(moment.to_string()),
        DeValue::Array(list) => Value::List(list.iter().map(|item| of_toml(item, lines)).collect()),
        DeValue::Table(table) => Value::Map(of_table(table, lines)),
    };
    Node::new(read, lines.at(start))
}

struct Lines<'t> {
    text: &'t str,
    path: &'t Arc<Path>,
    /// Where each line begins.
    starts: Vec<usize>,
}

impl<'t> Lines<'t> {
    fn of(text: &'t str, path: &'t Arc<Path>) -> Self {
        let starts = std::iter::once(0).chain(text.match_indices('\n').map(|(end, _)| end + 1)).collect();
        Self { text, path, starts }
    }

    fn at(&self, offset: usize) -> Place {
        let offset = self.text.floor_char_boundary(offset);
        let line = self.starts.partition_point(|start| *start <= offset);
        let begin = self.starts[line - 1];
        let column = self.text[begin..offset].chars().count() + 1;
        Place::File { path: Arc::clone(self.path), line: line as u32, column: column as u32 }
    }
}

fn yaml(text: &str, path: &Arc<Path>) -> Result<Node, Vec<Fault>> {
    let place = |line: u64, column: u64| Place::File {
        path: Arc::clone(path),
        line: u32::try_from(line).unwrap_or(u32::MAX),
        column: u32::try_from(column).unwrap_or(u32::MAX),
    };
    let options = serde_saphyr::options! {
        // They become numbers here and are refused by key, where they don't fit.
        non_finite_float_policy: serde_saphyr::options::NonFiniteFloatPolicy::PassThrough,
        with_snippet: false,
    };
    let parsed: Spanned<Yaml> = serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let at = error
            .location()
            .map_or_else(|| Place::Whole(Arc::clone(path)), |at| place(at.line(), at.column()));
        let text = error.to_string();
        // The place stands in front of it already.
        let message = text.rsplit_once(" at line ").map_or(text.as_str(), |(message, _)| message);
        // What follows is for those who call the parser.
        let message = message.split(", set DuplicateKeyPolicy").next().unwrap_or(message);
        let fault = Fault::new(&at, "", "YAML", message);
        vec![if message.contains("duplicate") {
            fault.hint("remove one of the two")
        } else if message.contains("tab") {
            fault.hint("indent with blanks")
        } else {
            fault
        }]
    })?;
    let node = of_yaml(parsed, &place);
    Ok(match node.value {
        // An empty file says nothing.
        Value::Null => Node::map(node.at),
        _ => node,
    })
}

enum Yaml {
    Scalar(Value),
    List(Vec<Spanned<Yaml>>),
    Map(Vec<(Spanned<String>, Spanned<Yaml>)>),
}

fn of_yaml(yaml: Spanned<Yaml>, place: &impl Fn(u64, u64) -> Place) -> Node {
    let at = place(yaml.referenced.line(), yaml.referenced.column());
    let value = match yaml.value {
        Yaml::Scalar(value) => value,
        Yaml::List(list) => Value::List(list.into_iter().map(|item| of_yaml(item, place)).collect()),
        Yaml::Map(map) => Value::Map(
            map.into_iter()
                .map(|(key, value)| Entry {
                    at: place(key.referenced.line(), key.referenced.column()),
                    name: key.value,
                    node: of_yaml(value, place),
                })
                .collect(),
        ),
    };
    Node::new(value, at)
}

impl<'de> Deserialize<'de> for Yaml {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyYaml)
    }
}

struct AnyYaml;

impl<'de> Visitor<'de> for AnyYaml {
    type Value = Yaml;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Yaml, E> {
        Ok(Yaml::Scalar(Value::Bool(value)))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Yaml, E> {
        Ok(Yaml::Scalar(Value::Integer(value.into())))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Yaml, E> {
        Ok(Yaml::Scalar(Value::Integer(value.into())))
    }

    fn visit_i128<E>(self, value: i128) -> Result<Yaml, E> {
        Ok(Yaml::Scalar(Value::Integer(value)))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Yaml, E> {
        Ok(Yaml::Scalar(Value::Float(value)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Yaml, E> {
        Ok(Yaml::Scalar(Value::Text(value.to_owned())))
    }

    fn visit_unit<E>(self) -> Result<Yaml, E> {
        Ok(Yaml::Scalar(Value::Null))
    }

    fn visit_none<E>(self) -> Result<Yaml, E> {
        Ok(Yaml::Scalar(Value::Null))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Yaml, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = list.next_element()? {
            items.push(item);
        }
        Ok(Yaml::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Yaml, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = map.next_key()? {
            entries.push((key, map.next_value()?));
        }
        Ok(Yaml::Map(entries))
    }
}
