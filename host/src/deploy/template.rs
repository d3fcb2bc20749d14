//! The templates, and how they are filled: with `[[ value ]]`, `[% statement %]` and `[# comment #]`, since Helm takes braces.

use minijinja::{AutoEscape, Environment, UndefinedBehavior, syntax::SyntaxConfig, value::Value};

use super::DeployError;

const TEMPLATES: [(&str, &str); 6] = [
    ("Chart.yaml", include_str!("templates/Chart.yaml")),
    ("Dockerfile", include_str!("templates/Dockerfile")),
    ("compose.yaml", include_str!("templates/compose.yaml")),
    ("kserve.yaml", include_str!("templates/kserve.yaml")),
    ("kubernetes.yaml", include_str!("templates/kubernetes.yaml")),
    ("modalkit.service", include_str!("templates/modalkit.service")),
];

/// Fills a template.
///
/// # Errors
/// It names what there is not: a mistake in this program.
pub(super) fn fill(name: &str, values: Value) -> Result<String, DeployError> {
    let mut environment = Environment::new();
    environment.set_syntax(
        SyntaxConfig::builder()
            .block_delimiters("[%", "%]")
            .variable_delimiters("[[", "]]")
            .comment_delimiters("[#", "#]")
            .build()?,
    );
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    // YAML, TOML and shell are no HTML: each template quotes what it needs to.
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_keep_trailing_newline(true);
    for (name, text) in TEMPLATES {
        environment.add_template(name, text)?;
    }
    Ok(environment.get_template(name)?.render(values)?)
}
