//! Pages for browsers, which are in this program with all that they need. It never knows who asks for them.

/// A file of a page.
pub struct Asset {
    /// Its name.
    pub name: &'static str,
    /// Its type.
    pub content_type: &'static str,
    /// What it holds.
    pub bytes: &'static [u8],
    /// Whether that is compressed (gzip).
    pub is_compressed: bool,
}

/// The page that shows the OpenAPI document.
pub static DOCS: Asset = Asset {
    name: "docs.html",
    content_type: "text/html; charset=utf-8",
    bytes: include_bytes!("docs.html"),
    is_compressed: false,
};

/// What that page asks for.
static DOCS_ASSETS: [Asset; 5] = [
    Asset {
        name: "docs.js",
        content_type: JAVASCRIPT,
        bytes: include_bytes!("docs.js"),
        is_compressed: false,
    },
    Asset { name: "docs.css", content_type: CSS, bytes: include_bytes!("docs.css"), is_compressed: false },
    Asset {
        name: "icon.svg",
        content_type: "image/svg+xml",
        bytes: include_bytes!("icon.svg"),
        is_compressed: false,
    },
    Asset {
        name: "swagger-ui-bundle.js",
        content_type: JAVASCRIPT,
        bytes: include_bytes!("swagger_ui/swagger-ui-bundle.js.gz"),
        is_compressed: true,
    },
    Asset {
        name: "swagger-ui.css",
        content_type: CSS,
        bytes: include_bytes!("swagger_ui/swagger-ui.css.gz"),
        is_compressed: true,
    },
];

const JAVASCRIPT: &str = "text/javascript; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";

/// What a page may do: run and show what this host sends, and ask this host.
pub const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// A file that the page of the OpenAPI document asks for.
#[must_use]
pub fn docs_asset(name: &str) -> Option<&'static Asset> {
    DOCS_ASSETS.iter().find(|asset| asset.name == name)
}

/// The names of all of them.
pub fn docs_asset_names() -> impl Iterator<Item = &'static str> {
    DOCS_ASSETS.iter().map(|asset| asset.name)
}
