//! Pages for browsers, which are in this program with all that they need. It never knows who asks for them.

use std::{
    io::{self, Read},
    sync::OnceLock,
};

use flate2::read::GzDecoder;
use sha2::{Digest, Sha256};

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
    tag: OnceLock<String>,
    plain: OnceLock<Vec<u8>>,
}

impl Asset {
    const fn new(
        name: &'static str,
        content_type: &'static str,
        bytes: &'static [u8],
        is_compressed: bool,
    ) -> Self {
        Self { name, content_type, bytes, is_compressed, tag: OnceLock::new(), plain: OnceLock::new() }
    }

    /// Its `ETag`: the same whether it goes out compressed or not.
    #[must_use]
    pub fn tag(&self) -> &str {
        self.tag.get_or_init(|| weak_tag(self.bytes))
    }

    /// What it holds, out of its compression. Takes a while the first time.
    ///
    /// # Errors
    /// It is broken.
    pub fn plain(&self) -> io::Result<&[u8]> {
        if !self.is_compressed {
            return Ok(self.bytes);
        }
        if self.plain.get().is_none() {
            let mut plain = Vec::new();
            GzDecoder::new(self.bytes).read_to_end(&mut plain)?;
            // Somebody else may have been as quick.
            let _ = self.plain.set(plain);
        }
        Ok(self.plain.get().map_or(&[], |plain| plain))
    }
}

/// An `ETag` of these bytes, whatever coding they go out in.
#[must_use]
pub fn weak_tag(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    format!("W/\"{}\"", digest[..12].iter().map(|byte| format!("{byte:02x}")).collect::<String>())
}

/// The page that shows the OpenAPI document.
pub static DOCS: Asset =
    Asset::new("docs.html", "text/html; charset=utf-8", include_bytes!("docs.html"), false);

/// What that page asks for.
static DOCS_ASSETS: [Asset; 5] = [
    Asset::new("docs.js", JAVASCRIPT, include_bytes!("docs.js"), false),
    Asset::new("docs.css", CSS, include_bytes!("docs.css"), false),
    Asset::new("icon.svg", "image/svg+xml", include_bytes!("icon.svg"), false),
    Asset::new(
        "swagger-ui-bundle.js",
        JAVASCRIPT,
        include_bytes!("swagger_ui/swagger-ui-bundle.js.gz"),
        true,
    ),
    Asset::new("swagger-ui.css", CSS, include_bytes!("swagger_ui/swagger-ui.css.gz"), true),
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
