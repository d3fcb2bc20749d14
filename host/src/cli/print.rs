//! How commands write: tables for people, colour on a terminal only.

use std::io::IsTerminal;

/// Columns as wide as their widest cell, the last as long as it is.
pub(crate) fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// Levels that are indented; deeper ones stand below each other.
const INDENTED_LEVELS_MAX: usize = 32;

/// JSON with a line for each member, and every token as it stands: read and written again, a number could be another one.
pub(crate) fn indented(json: &str) -> String {
    let mut text = String::with_capacity(2 * json.len());
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    let line = |text: &mut String, depth: usize| {
        text.push('\n');
        text.extend(std::iter::repeat_n("  ", depth.min(INDENTED_LEVELS_MAX)));
    };
    for letter in json.chars() {
        if in_string {
            text.push(letter);
            in_string = escaped || letter != '"';
            escaped = !escaped && letter == '\\';
            continue;
        }
        let opened = text.ends_with(['{', '[']);
        match letter {
            ' ' | '\t' | '\r' | '\n' => continue,
            '}' | ']' => {
                depth = depth.saturating_sub(1);
                if !opened {
                    line(&mut text, depth);
                }
            }
            _ if opened => line(&mut text, depth),
            _ => {}
        }
        text.push(letter);
        match letter {
            '{' | '[' => depth += 1,
            '"' => in_string = true,
            ':' => text.push(' '),
            ',' => line(&mut text, depth),
            _ => {}
        }
    }
    text
}

/// A text in this colour of ANSI, where standard output is a terminal and nobody has said that they want none.
pub(crate) fn coloured(text: &str, colour: Colour) -> String {
    if std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        format!("\u{1b}[{}m{text}\u{1b}[0m", colour as u8)
    } else {
        text.to_owned()
    }
}

/// The colours there are, by their ANSI numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Colour {
    Red = 31,
    Green = 32,
    Yellow = 33,
    Grey = 90,
}

/// Writes to standard output. A reader that has left, as `head` does, ends the matter.
pub(crate) fn print(text: &str) {
    use std::io::Write;
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
}

/// Writes an error and its causes to standard error; a host that serves doesn't wait for its reader.
pub(crate) fn complain(error: &anyhow::Error) {
    modalkit::insight::log::say(&format!("error: {error:#}\n"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_indented_and_each_token_is_as_it_was() {
        let json =
            r#"{"b":1e999, "a": [ ], "s":"{\"x\": [\\", "n":[12345678901234567890123.50,{}],"a":"\ud800"}"#;
        let expected = "{\n  \"b\": 1e999,\n  \"a\": [],\n  \"s\": \"{\\\"x\\\": [\\\\\",\n  \"n\": [\n    12345678901234567890123.50,\n    {}\n  ],\n  \"a\": \"\\ud800\"\n}";
        assert_eq!(indented(json), expected);
        let deep = indented(&format!("{}{}", "[".repeat(100_000), "]".repeat(100_000)));
        assert!(deep.len() < 20_000_000);
    }
}
