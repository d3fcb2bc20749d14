//! Names, as clusters, shells and YAML take them.

/// Names in a cluster have at most so many letters; some are followed by others.
const NAME_CHARS_MAX: usize = 40;
/// What YAML takes for something else than a text.
const NO_TEXTS: [&str; 8] = ["y", "n", "yes", "no", "on", "off", "true", "false"];

/// A name as clusters take them: small letters, digits and hyphens, a letter first.
pub(super) fn name_of(text: &str) -> String {
    let name: String = letters(text).chars().take(NAME_CHARS_MAX).collect();
    let name = name.trim_matches('-').to_owned();
    match name.chars().next() {
        None => "modalkit".to_owned(),
        Some(first)
            if !first.is_ascii_alphabetic() || NO_TEXTS.contains(&name.as_str()) || name == "null" =>
        {
            format!("app-{name}")
        }
        Some(_) => name,
    }
}

/// Small letters, digits and hyphens.
pub(super) fn letters(text: &str) -> String {
    let letter =
        |letter: char| if letter.is_ascii_alphanumeric() { letter.to_ascii_lowercase() } else { '-' };
    text.chars().map(letter).collect()
}

/// A Secret's own name: dots may stand in it.
pub(super) fn secret_name(text: &str) -> String {
    let parts = text.split('.').map(letters);
    parts.collect::<Vec<_>>().join(".").trim_matches(['-', '.']).to_owned()
}

/// Whether shells, compose and systemd take it for a variable's name.
pub(super) fn is_variable(text: &str) -> bool {
    text.chars().next().is_some_and(|first| first.is_ascii_alphabetic() || first == '_')
        && text.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_such_as_clusters_take() {
        for (text, name) in [
            ("Demo_App.v2", "demo-app-v2"),
            ("--", "modalkit"),
            ("3d", "app-3d"),
            ("true", "app-true"),
            ("2048", "app-2048"),
        ] {
            assert_eq!(name_of(text), name);
        }
        assert_eq!(name_of(&"x".repeat(100)).len(), NAME_CHARS_MAX);
        assert_eq!([secret_name("HF_TOKEN"), secret_name("team.aws")], ["hf-token", "team.aws"]);
        assert!(is_variable("A_1") && !is_variable("MY-KEY") && !is_variable("1A"));
    }
}
